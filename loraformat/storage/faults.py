"""Errors of the operating system as StorageError, and the file names that a store accepts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from loraformat.diagnostics import show
from loraformat.errors import StorageError

_REASONS = {
    errno.ENOENT: "no such file or folder",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left in the quota",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many open files",
}

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
)


@contextmanager
def as_storage_error(where: str) -> Iterator[None]:
    """A block in which every OSError becomes a StorageError at `where`."""
    try:
        yield
    except OSError as error:
        raise StorageError(reason_of(error), where=where) from error
    except ValueError as error:  # a NUL or a lone surrogate in a path never reaches the operating system
        raise StorageError("not a path", where=show(where)) from error


def reason_of(error: OSError) -> str:
    """What went wrong, without the path and the number."""
    known = _REASONS.get(error.errno or 0)
    return known or (error.strerror or type(error).__name__).lower()


def checked_name(name: str, uri: str) -> str:
    """`name`, if it is a single path component.

    Raises: StorageError: empty, `.`, `..`, or with a slash, a backslash or a NUL in it.
    """
    if name in ("", os.curdir, os.pardir) or any(character in name for character in "/\\\0"):
        raise StorageError(f'"{show(name)}" is not a file name: it must be a single path component', where=uri)
    return name


def checked_range(where: str, size: int, offset: int, nbytes: int) -> None:
    """Raises: StorageError: a file of `size` bytes has no bytes `offset` to `offset + nbytes`."""
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        raise StorageError(
            f"bytes {offset} to {offset + nbytes} were requested, but the file ends at byte {size}", where=where
        )


def checked_total(where: str, size: int | None, written: int) -> None:
    """Raises: StorageError: fewer bytes were written than `size`, which was announced."""
    if size is not None and written < size:
        raise StorageError(f"expected {size} bytes, but {written} were written", where=where)


def kind_of(mode: int) -> str:
    """What an `st_mode` of lstat is, as a noun: "a file", "a folder", "a symbolic link", "a FIFO" ..."""
    return next((noun for is_kind, noun in _KINDS if is_kind(mode)), "something else")
