"""SHA-256 of a tensor that is written in windows by several threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition


class Digest:
    """Takes windows in the order of their rows, whichever is computed first.

    A thread waits for the windows before its own. Windows are begun in order, so those are at work or done.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._next = 0
        self._has_failed = False
        self._moved = Condition()

    @contextmanager
    def turn(self, start: int, stop: int) -> Iterator[Callable[[memoryview], None]]:
        """A block that computes rows `start:stop` and calls what it is given with their bytes.

        Where it raises, windows after it are not waited for any more: the tensor has no digest then.
        """

        def add(data: memoryview) -> None:
            with self._moved:
                self._moved.wait_for(lambda: self._next == start or self._has_failed)
            self._hash.update(data)
            with self._moved:
                self._next = stop
                self._moved.notify_all()

        try:
            yield add
        except BaseException:
            with self._moved:
                self._has_failed = True
                self._moved.notify_all()
            raise

    def hexdigest(self) -> str:
        """The SHA-256 of all windows so far."""
        return self._hash.hexdigest()
