"""Signals held back while files are made or removed that must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from loraformat.machine import ENDING

if TYPE_CHECKING:
    from typing_extensions import Self


class Deferral:
    """While it lasts, the signals of `ENDING` are noted and handled when it ends; only in the main thread.

    A handler that raises can strike between any two steps, also between making a file and the `try` that would remove
    it. Inside `delivered()` handlers work as usual.
    """

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._handlers: dict[int, object] = {}
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        self._hold()
        return self

    def __exit__(self, *raised: object) -> None:
        self._release()

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """A block in which signals are handled again, those first that were noted before."""
        self._release()
        try:
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if not self._is_main:
            return
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler is not None:
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _release(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
        while self._noted:
            signal.raise_signal(self._noted.pop(0))

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._noted.append(number)
