"""Bytes kept in an unnamed temporary file, which cannot be left behind, until they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from loraformat.storage.faults import as_storage_error
from loraformat.storage.platform import platform


class Spool:
    """An append-only file that threads may share."""

    def __init__(self, fd: int, where: str) -> None:
        self._fd, self._where = fd, where
        self._end = 0
        self._lock = Lock()

    def add(self, data: memoryview) -> int:
        """Put bytes at the end; where they begin. Raises: StorageError: there is no space."""
        with self._lock:
            start, self._end = self._end, self._end + data.nbytes
        done = 0
        with as_storage_error(self._where):
            while done < data.nbytes:
                done += platform().write_at(self._fd, data[done:], start + done)
        return start

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Bytes that were put aside."""
        found, done = bytearray(nbytes), 0
        view = memoryview(found)
        with as_storage_error(self._where):
            while done < nbytes:
                done += platform().read_into(self._fd, view[done:], offset + done)
        return found


@contextmanager
def open_spool(out: str) -> Iterator[Spool]:
    """A spool on the file system of an output, or where temporary files go if its folder is not there.

    Raises: StorageError: no file can be made there.
    """
    import tempfile

    parent = os.path.dirname(os.path.abspath(out))
    with ExitStack() as stack:
        with as_storage_error(out):
            folder = parent if os.path.isdir(parent) else None
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        yield Spool(file.fileno(), out)
