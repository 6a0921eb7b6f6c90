"""Report files: a regular file appears complete or not at all, anything else is written through, never replaced."""

from __future__ import annotations

import os
import stat
import sys

from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error, kind_of
from loraformat.storage.local.store import LocalStore
from loraformat.storage.platform import WRITE_FLAGS, is_same_file


def write_to(path: str, data: bytes) -> None:
    """Put bytes where a path leads: into a new file, in the place of a regular one, or through what else is there.

    FIFOs, character devices and links are written through, as a shell does it: neither a node nor a link is ever
    replaced. What leads to our own standard output or error goes there, after what was printed. As in a shell, opening
    a FIFO waits for its reader.

    Raises: StorageError: a folder or a block device is there, a link leads nowhere, or it cannot be written.
    """
    if not os.path.lexists(path) or stat.S_ISREG(os.lstat(path).st_mode):
        _replace(path, data)
        return
    with as_storage_error(path):
        status = os.stat(path)
    stream = _own_stream(status)
    if stream is not None:
        _write_all(stream, data)
    elif stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        with as_storage_error(path):
            _write_through(path, data, status)
    else:  # a block device is a disk
        raise StorageError(f"{kind_of(status.st_mode)} exists there, which is not written to", where=path)


def is_own_stream(path: str) -> bool:
    """Whether a path leads to our own standard output or error. Raises: StorageError: nothing is there."""
    with as_storage_error(path):
        status = os.stat(path)
    return any(_is_of(status, number) for number in (1, 2))


def _write_through(path: str, data: bytes, status: os.stat_result) -> None:
    fd = os.open(path, WRITE_FLAGS)
    try:
        if not os.path.samestat(os.fstat(fd), status):
            raise StorageError("the file changed while it was opened", where=path)
        if stat.S_ISREG(status.st_mode):
            os.ftruncate(fd, 0)
        _write_all(fd, data)
    finally:
        os.close(fd)


def _replace(path: str, data: bytes) -> None:
    folder, name = os.path.split(path)
    with LocalStore(folder or ".").create(name, len(data)) as writer:
        writer.write(data)


def _own_stream(status: os.stat_result) -> int | None:
    """The descriptor of our standard output or error, where that is what `status` is of.

    Opened anew, a redirected file would have a place of its own in it, and each would overwrite the other.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if _is_of(status, number):
            stream.flush()
            return number
    return None


def _is_of(status: os.stat_result, fd: int) -> bool:
    try:
        return is_same_file(status, os.fstat(fd))
    except OSError:  # it is closed
        return False


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
