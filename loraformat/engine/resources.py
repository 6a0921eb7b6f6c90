"""Errors of the system about memory and threads, as OutOfResources."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterator

from loraformat.errors import OutOfResources

# Addresses that a library takes when it is imported, and a margin for what is done with it (numpy 2.4.6: 80 MB;
# torch 2.13, CPU: 480 MB; Linux).
_ROOM_NBYTES = {"numpy": 128 << 20, "torch": 640 << 20}
_THREADS_HINT = "raise the limit (ulimit -u, or that of the container); merge --jobs 1 needs fewer"
_MEMORY_HINT = "raise the limit (ulimit -v, or that of the container); merge --jobs 1 or a smaller --memory needs less"
_NO_MEMORY = ("cannot allocate memory", "can't allocate memory", "failed to map segment", "not enough memory")


# Without a base class: importing `importlib.abc` takes a fifth of the time of `loraformat --help`.
class ImportGuard:
    """A finder of modules that refuses to import numpy or torch where there is no room for them.

    Their libraries end the process on the spot where they get no memory or no threads, and what is half written stays
    behind; numpy's raises SIGINT, as if the user had interrupted us. An error before that can be handled.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Finds nothing. Raises: MemoryError; RuntimeError: threads cannot be started."""
        del path, target
        if fullname in _ROOM_NBYTES:
            _require_room(_ROOM_NBYTES[fullname])
        if fullname == "torch":
            _require_threads(os.cpu_count() or 1)


def guard_imports() -> None:
    """See `ImportGuard`; for a process of our own, in which products of numpy get one thread: merges have their own."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not any(isinstance(finder, ImportGuard) for finder in sys.meta_path):
        sys.meta_path.insert(0, ImportGuard())


def _require_room(nbytes: int) -> None:
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows: room can only be tried there by taking the memory itself
        return
    try:
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
    except OSError as error:
        raise MemoryError from error


def _require_threads(count: int) -> None:
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        done.set()
        for thread in started:
            thread.join()


def as_out_of_resources(error: BaseException) -> OutOfResources | None:
    """The error in our words, where it says that memory or threads are used up; else None."""
    for each in _causes(error):
        text = str(each).lower()
        if isinstance(each, RuntimeError) and "can't start new thread" in text:
            return OutOfResources("no more threads can be started", hint=_THREADS_HINT)
        is_library = isinstance(each, (ImportError, RuntimeError, OSError))
        if isinstance(each, MemoryError) or (is_library and any(words in text for words in _NO_MEMORY)):
            return OutOfResources("not enough memory", hint=_MEMORY_HINT)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
