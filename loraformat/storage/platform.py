"""What storage asks of the operating system: positional reads and writes, locks, shared blocks, direct writes, modes.

Everything but reads and writes is allowed to do nothing: where a system has no such call, files are copied through
memory.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

_MOST_AT_ONCE = 64 << 20  # a signal is answered between two calls
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of a whole file
# A locked byte of Windows cannot be read either: it is far behind what stands in a lock.
_LOCKED_AT = 1 << 30
_LOCKED = {errno.EACCES, errno.EDEADLK}  # as the C library of Windows says it
# How often, and how far apart, Windows is asked for a shared lock: another process that takes one has it for a moment.
_SHARED_TRIES, _SHARED_WAIT_S = 50, 0.02
# One number on Linux, two on macOS, whose file systems answer with either of them.
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_LOCKS = {*_UNSUPPORTED, errno.ENOLCK}
_CANNOT_RESERVE = {*_UNSUPPORTED, errno.EINVAL}
_CANNOT_CLONE = {*_UNSUPPORTED, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.EBADF}
_CANNOT_COPY_INSIDE = {*_UNSUPPORTED, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY}
_CANNOT_SYNC = {*_UNSUPPORTED, errno.EINVAL}
# Network and FUSE file systems know no sync of a folder, or do not let it be opened as a file is.
_CANNOT_SYNC_FOLDER = {*_CANNOT_SYNC, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}

# A FIFO is not waited for, a link is not followed where a file is made, and no child inherits a descriptor.
_INHERITED = getattr(os, "O_CLOEXEC", getattr(os, "O_NOINHERIT", 0))
_BINARY = getattr(os, "O_BINARY", 0)  # without it Windows changes the ends of lines
READ_FLAGS = os.O_RDONLY | _INHERITED | _BINARY | getattr(os, "O_NONBLOCK", 0)
NEW_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | _INHERITED | _BINARY | getattr(os, "O_NOFOLLOW", 0)
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | _INHERITED | _BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
WRITE_FLAGS = os.O_WRONLY | _INHERITED | _BINARY | getattr(os, "O_NOCTTY", 0)
NO_FOLLOW = _INHERITED | _BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Platform(Protocol):
    """One operating system. Whatever else goes wrong raises OSError."""

    removes_open_files: bool
    """Whether a file that is open can be removed."""

    reserves_names: bool
    """Whether names can be those of devices, drives or streams inside files, as on Windows."""

    def read_at(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read bytes at a place, from any thread; fewer than asked for, and none at the end of the file."""

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """The same into memory; how many were read."""

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        """Write bytes at a place, from any thread; how many were."""

    def lock(self, fd: int, *, shared: bool = False) -> None:
        """Lock a file until it is unlocked and closed; nothing where there are no locks.

        A lock that is `shared` stands beside others of its kind. A second call changes the kind of the lock; where
        that raises, the first lock may be gone.

        Raises: BlockingIOError: another descriptor has it locked.
        """

    def unlock(self, fd: int) -> None:
        """Unlock a file that is closed next; nothing where closing it does so at once."""

    def clone(self, fd: int, source: int) -> bool:
        """Let a new file share all blocks of another; False where that is not possible."""

    def copy_range(self, fd: int, source: int, source_offset: int, offset: int, nbytes: int) -> int:
        """Copy between files without moving the bytes through memory; how many were, 0 where that is not possible."""

    def reserve(self, fd: int, nbytes: int) -> None:
        """Take room on the disk for a file, where the file system can promise it."""

    def open_direct(self, path: str) -> int | None:
        """A descriptor that writes whole pages past the page cache; None where there is no such thing."""

    def sync(self, fd: int) -> None:
        """Make the bytes of a file durable, where the file system can. Raises OSError: they may be lost."""

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable, where the file system can and lets us. Raises OSError: it failed."""

    def free_nbytes(self, folder: str) -> int | None:
        """Bytes that may still be written below a folder; None where nobody knows."""

    def is_mine(self, status: os.stat_result) -> bool:
        """Whether a file belongs to the user of this process."""

    def group(self) -> int:
        """The group that new files of this process get."""

    def umask(self) -> int:
        """The mode bits that new files of this process do not get."""


class Posix:
    """Linux and its relatives; each call is there or does nothing."""

    removes_open_files = True
    reserves_names = False

    def read_at(self, fd: int, nbytes: int, offset: int) -> bytes:
        """See Platform."""
        return os.pread(fd, min(nbytes, _MOST_AT_ONCE), offset)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """See Platform."""
        if hasattr(os, "preadv"):
            return os.preadv(fd, [buffer[:_MOST_AT_ONCE]], offset)
        data = self.read_at(fd, buffer.nbytes, offset)  # macOS before 11, WebAssembly
        buffer[: len(data)] = data
        return len(data)

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        """See Platform."""
        return os.pwrite(fd, data[:_MOST_AT_ONCE], offset)

    def lock(self, fd: int, *, shared: bool = False) -> None:
        """See Platform."""
        import fcntl

        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def unlock(self, fd: int) -> None:
        """See Platform."""

    def clone(self, fd: int, source: int) -> bool:
        """See Platform."""
        if sys.platform != "linux":  # the number means another call elsewhere
            return False
        import fcntl

        try:
            fcntl.ioctl(fd, _FICLONE, source)
        except OSError as error:
            if error.errno in _CANNOT_CLONE:
                return False
            raise
        return True

    def copy_range(self, fd: int, source: int, source_offset: int, offset: int, nbytes: int) -> int:
        """See Platform."""
        done = 0
        while hasattr(os, "copy_file_range") and done < nbytes:
            count = min(nbytes - done, _MOST_AT_ONCE)
            try:
                moved = os.copy_file_range(source, fd, count, source_offset + done, offset + done)
            except OSError as error:
                if error.errno in _CANNOT_COPY_INSIDE:
                    break
                raise
            if moved == 0:
                break
            done += moved
        return done

    def reserve(self, fd: int, nbytes: int) -> None:
        """See Platform."""
        if not nbytes or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise

    def open_direct(self, path: str) -> int | None:
        """See Platform."""
        if not hasattr(os, "O_DIRECT"):
            return None
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)

    def sync(self, fd: int) -> None:
        """See Platform."""
        with _without(_CANNOT_SYNC):
            os.fsync(fd)

    def sync_folder(self, path: str) -> None:
        """See Platform."""
        with _without(_CANNOT_SYNC_FOLDER):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def free_nbytes(self, folder: str) -> int | None:
        """See Platform."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def is_mine(self, status: os.stat_result) -> bool:
        """See Platform."""
        return status.st_uid == os.geteuid()

    def group(self) -> int:
        """See Platform."""
        return os.getegid()

    def umask(self) -> int:
        """See Platform."""
        found = os.umask(0o077)
        os.umask(found)
        return found


class Plain:
    """A system of which nothing is known but that files can be read, written, renamed and made durable."""

    removes_open_files = False
    reserves_names = False

    def __init__(self) -> None:
        self._position = threading.Lock()  # of a file, which its readers and writers share

    def read_at(self, fd: int, nbytes: int, offset: int) -> bytes:
        """See Platform."""
        with self._position:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, min(nbytes, _MOST_AT_ONCE))

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """See Platform."""
        data = self.read_at(fd, buffer.nbytes, offset)
        buffer[: len(data)] = data
        return len(data)

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        """See Platform."""
        with self._position:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data[:_MOST_AT_ONCE])

    def lock(self, fd: int, *, shared: bool = False) -> None:
        """See Platform."""

    def unlock(self, fd: int) -> None:
        """See Platform."""

    def clone(self, fd: int, source: int) -> bool:
        """See Platform."""
        del fd, source
        return False

    def copy_range(self, fd: int, source: int, source_offset: int, offset: int, nbytes: int) -> int:
        """See Platform."""
        del fd, source, source_offset, offset, nbytes
        return 0

    def reserve(self, fd: int, nbytes: int) -> None:
        """See Platform."""

    def open_direct(self, path: str) -> int | None:
        """See Platform."""
        del path
        return None

    def sync(self, fd: int) -> None:
        """See Platform."""
        with _without(_CANNOT_SYNC):
            os.fsync(fd)

    def sync_folder(self, path: str) -> None:
        """See Platform."""

    def free_nbytes(self, folder: str) -> int | None:
        """See Platform."""
        del folder
        return None

    def is_mine(self, status: os.stat_result) -> bool:
        """See Platform."""
        return stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)

    def group(self) -> int:
        """See Platform."""
        return 0

    def umask(self) -> int:
        """See Platform."""
        return 0


class Windows(Plain):
    """`Plain` with locks, by which a run knows that an unfinished output is in use, and with reserved names.

    Args: wait: how to pass some seconds before a lock is asked for again.
    """

    reserves_names = True

    def __init__(self, wait: Callable[[float], None] = time.sleep) -> None:
        super().__init__()
        self._wait = wait

    def lock(self, fd: int, *, shared: bool = False) -> None:
        """See Platform. Windows' C library has no shared locks: such a lock is taken and given back.

        Processes that start together meet in that moment, so that only one that stays out for a second is refused.
        """
        tries = _SHARED_TRIES if shared else 1
        while not self._take(fd, gives_back=shared):
            tries -= 1
            if not tries:
                raise BlockingIOError(errno.EACCES, "another process has the file locked")
            self._wait(_SHARED_WAIT_S)

    def _take(self, fd: int, *, gives_back: bool) -> bool:
        """Lock a file, and unlock it if it is given back; False where another descriptor has it."""
        import msvcrt

        with self._position:
            os.lseek(fd, _LOCKED_AT, os.SEEK_SET)
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
            except OSError as error:
                if error.errno in _LOCKED:
                    return False
                raise
            if gives_back:
                os.lseek(fd, _LOCKED_AT, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return True

    def unlock(self, fd: int) -> None:
        """See Platform. Windows frees the byte of a closed file late, so that the next run would find it locked.

        Source: Microsoft, LockFile, "Remarks".
        """
        import msvcrt

        with self._position, suppress(OSError):  # a shared lock was given back when it was taken
            os.lseek(fd, _LOCKED_AT, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]


PLATFORM: Platform = Windows() if os.name == "nt" else Posix()


def platform() -> Platform:
    """The operating system of this process."""
    return PLATFORM


def is_same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two statuses are known to be of one file.

    On Windows NUL, the console and pipes have the inode 0, as do files on some network drives.
    """
    return bool(one.st_ino) and os.path.samestat(one, other)


@contextmanager
def _without(refusals: Collection[int]) -> Iterator[None]:
    """A block that a file system may refuse with one of these error numbers; it is left out then."""
    try:
        yield
    except OSError as error:
        if error.errno not in refusals:
            raise
