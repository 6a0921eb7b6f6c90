"""Errors of the operating system as StorageError, and the file names that a store accepts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.platform import platform

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

# Names that mean something else on Windows. Source: Microsoft, "Naming Files, Paths, and Namespaces".
_PORTS = {f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"}
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS}
_NEVER_IN_NAMES = '<>"|?*'


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


def checked_local_name(name: str, uri: str) -> str:
    """As `checked_name`, for a file of this machine; on Windows also a name that leads to no other file or device.

    Raises: StorageError: it is not.
    """
    checked_name(name, uri)
    reason = reserved(name) if platform().reserves_names else ""
    if reason:
        hint = "rename it where it comes from, or run the command on Linux or macOS"
        raise StorageError(f'"{show(name)}" cannot be a file name on Windows: {reason}', where=uri, hint=hint)
    return name


def reserved(name: str) -> str:
    """Why a path component cannot name a file on Windows; "" where it can."""
    stem = name.partition(".")[0].rstrip(" ").upper()
    if ":" in name:
        return "a colon separates a drive, or a stream inside a file"
    if stem in _DEVICES:
        return f"{stem} is a device, with any extension"
    if name[-1:] in (".", " "):
        return "a dot or a space at the end is ignored, so that it names another file"
    unusable = next((character for character in name if character in _NEVER_IN_NAMES or character < " "), None)
    return "" if unusable is None else f'it contains "{show(unusable)}"'


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


def refuse_existing(
    where: str,
    noun: str,
    others: Sequence[str],
    *,
    overwrite: bool,
    names: Collection[str],
    written: object,
) -> None:
    """Refuse an output that exists, unless the run may replace it.

    Args:
        noun: what stands there, "folder" or "prefix".
        others: names of files there that are not the run's to replace.
        names: of the files that the run will write; empty where it replaces nothing without `written`.
        written: as of `stage`.

    Raises: StorageError: it may not be replaced, with the reason.
    """
    remove = f"use another name, or remove the {noun} yourself"
    if not overwrite and not names and written is None:
        raise StorageError("the output exists already", where=where, hint=remove)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        whose = "this run does not write" if written is None else "no earlier run of this command wrote"
        held = f"holds {show(others[0], 100)}{more}, which {whose}, so"
        if not overwrite:
            text = f"the output exists already; the {noun} {held} --overwrite would not replace it"
            raise StorageError(text, where=where, hint=remove)
        only = "the files that the run writes" if written is None else "earlier outputs of the same command"
        hint = f"--overwrite replaces only {only}; {remove}"
        raise StorageError(f"the {noun} {held} it is not replaced", where=where, hint=hint)
    if not overwrite:
        raise StorageError("the output exists already", where=where, hint="replace it with --overwrite")
