"""Locks of an output: for one process, or shared by all that write its files together."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error
from loraformat.storage.platform import LOCK_FLAGS, platform

_MOST_NBYTES = 20


@contextmanager
def locked(target: str, lock: str, *, shared: bool = False) -> Iterator[None]:
    """The right to write to `target`, for as long as this process lives or the block lasts.

    Args:
        lock: path of the file that is locked; it is removed by the last one that lets go of it.
        shared: beside other processes that ask for a shared lock too.

    Raises: StorageError: another process has it, or something else stands at `lock`.
    """
    with as_storage_error(target):
        fd = _take(target, lock, shared=shared)
    try:
        yield
    finally:
        _let_go(fd, lock if not shared or _is_last(fd) else None)


def _take(target: str, lock: str, *, shared: bool) -> int:
    while True:
        try:
            fd = os.open(lock, LOCK_FLAGS, 0o666)
        except OSError as error:
            # Windows denies access to a folder that is opened as a file.
            if error.errno not in (errno.EISDIR, errno.ELOOP) and not os.path.isdir(lock):
                raise
            raise _no_lock(target, lock) from error
        try:
            platform().lock(fd, shared=shared)
        except BlockingIOError:
            owner = platform().read_at(fd, _MOST_NBYTES, 0).decode("ascii", "replace").partition("\n")[0].strip()
            os.close(fd)
            raise StorageError(f"in use by pid {owner or 'unknown'}", where=target) from None
        except OSError:
            os.close(fd)
            raise
        if not _is_lock(fd):
            _close(fd)
            raise _no_lock(target, lock)
        if _is_same_file(fd, lock):
            with suppress(OSError):  # a full disk shows soon enough; the number is only for the other run's message
                os.ftruncate(fd, 0)
                platform().write_at(fd, memoryview(f"{os.getpid()}\n".encode("ascii")), 0)
            return fd
        _close(fd)  # the run before us removed it between our open and our lock


def _let_go(fd: int, lock: str | None) -> None:
    """Close a lock, and remove its file if it is named.

    Before the descriptor goes, so that nobody can hold a lock on a file that has lost its name; and after it where open
    files cannot be removed, since that fails if another process has the lock by then.
    """
    if not platform().removes_open_files:
        _close(fd)
    if lock is not None:
        with suppress(OSError):
            os.unlink(lock)
    if platform().removes_open_files:
        _close(fd)


def _close(fd: int) -> None:
    platform().unlock(fd)
    os.close(fd)


def _is_last(fd: int) -> bool:
    """Whether nobody else holds a shared lock; it is then ours alone, else we have let go of it."""
    try:
        platform().lock(fd)
    except OSError:
        return False
    return True


def _no_lock(target: str, lock: str) -> StorageError:
    return StorageError("another file is in the place of its lock", where=target, hint=f"remove {show(lock)}")


def _is_lock(fd: int) -> bool:
    """Whether a file is a lock of ours: one of its own, with no more in it than a number.

    It is emptied and removed; another name of it may be that of a file that somebody needs.
    """
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_size <= _MOST_NBYTES


def _is_same_file(fd: int, path: str) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)  # also where files have no numbers: another try would find the same
