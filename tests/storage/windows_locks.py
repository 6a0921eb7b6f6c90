"""A stand-in for the module `msvcrt`: locks of byte ranges as the C library of Windows has them, from those of Linux.

A range belongs to one descriptor. Nobody else can have it, in the same process either, and its owner cannot have it
twice or give it back twice. Source: Microsoft, `_locking` and `LockFile`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

LK_UNLCK, LK_NBLCK = 0, 2
_F_OFD_SETLK = 37  # linux/fcntl.h: of an open file, not of a process
_FLOCK = "hhqqi4x"  # struct flock

held: set[tuple[int, int, int]] = set()
"""The ranges that this process has: (descriptor, first byte, bytes)."""

_close = os.close


def locking(fd: int, mode: int, nbytes: int) -> None:
    """Lock or unlock bytes from the position of a descriptor on."""
    place = (fd, os.lseek(fd, 0, os.SEEK_CUR), nbytes)
    if (place in held) == (mode == LK_NBLCK):
        raise PermissionError(errno.EACCES, "Permission denied")
    kind = fcntl.F_UNLCK if mode == LK_UNLCK else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, place[1], nbytes, 0))
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error
    if mode == LK_UNLCK:
        held.remove(place)
    else:
        held.add(place)


def close(fd: int) -> None:
    """As os.close, for files without a locked range: Windows frees that at a time of its own."""
    locked = sorted(place for place in held if place[0] == fd)
    if locked:
        os.write(2, f"closed with bytes locked: {locked}\n".encode())
        os._exit(70)
    _close(fd)
