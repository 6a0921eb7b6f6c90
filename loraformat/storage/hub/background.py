"""Calls into a library that ignores signals while it waits: made in a thread, so that the caller can stop."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from loraformat.errors import StorageError

T = TypeVar("T")


def in_background(call: Callable[[], T], patience_s: float | None = None) -> T:
    """The result of a call. An exception in the waiting thread, a signal's above all, leaves the call to itself.

    Raises: StorageError: no result after `patience_s` seconds; and what the call raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again below, where somebody waits for it
            errors.append(error)
        done.set()

    with _quiet():
        threading.Thread(target=run, name="loraformat-hub", daemon=True).start()
        if not done.wait(patience_s):
            raise StorageError(f"the Hub did not answer within {patience_s:.0f} s", hint="try again later")
    if errors:
        raise errors[0]
    return results[0]


def all_in_background(calls: Sequence[Callable[[], object]], threads: int) -> None:
    """Make several calls, some at a time; after an exception, here or in one of them, no further one is begun.

    Their threads do not keep this process alive, as those of a pool of the standard library would.

    Raises: what one of the calls raises.
    """
    waiting = deque(calls)
    errors: list[BaseException] = []
    stopped = threading.Event()
    ended = threading.Semaphore(0)

    def run() -> None:
        while not stopped.is_set():
            try:
                call = waiting.popleft()
            except IndexError:
                break
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                stopped.set()
        ended.release()

    count = min(threads, len(calls))
    with _quiet():
        try:
            for _ in range(count):
                threading.Thread(target=run, name="loraformat-hub", daemon=True).start()
            for _ in range(count):
                ended.acquire()
        finally:
            stopped.set()
    if errors:
        raise errors[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without the bars, warnings and log lines of huggingface_hub, which name addresses that are signed."""
    from huggingface_hub import utils

    bars: Any = utils  # it does not mark what it exports
    logger = logging.getLogger("huggingface_hub")
    level, were_disabled = logger.level, bars.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        bars.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if not were_disabled:
                bars.enable_progress_bars()
