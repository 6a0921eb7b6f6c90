"""Writes that go past the page cache: whole pages straight to the disk, by its own memory access.

A large file is written once and not read soon. Through the page cache every byte of it costs a copy and a fresh page of
memory, a disk full of unwritten pages at the end, and what other programs had cached; past it a thread only waits.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable

from loraformat.storage.platform import platform

PAGE_NBYTES = max(4096, mmap.PAGESIZE)
LEAST_NBYTES = 16 << 20  # of a file that is written so

_BOUNCE_NBYTES = 4 << 20
_MOST_AT_ONCE = 64 << 20
# Where it is known to work and to pay. Elsewhere (network and stacked file systems) the kernel's own copies are better.
_FILE_SYSTEMS = {"ext3", "ext4", "xfs"}
_MOUNTS = "/proc/self/mountinfo"


def memory_at(phase: int, nbytes: int) -> memoryview:
    """`nbytes` bytes of new memory that begin `phase` bytes into a page: writes at such an offset need no copy."""
    return memoryview(mmap.mmap(-1, nbytes + PAGE_NBYTES))[phase : phase + nbytes]


class DirectFile:
    """One file, opened twice: past the page cache for whole pages, and through it for what is left at their ends.

    Each byte is to be written once, from any thread. Parts of a page are kept until the page is whole: page cache and
    disk never hold different parts of one page.

    Args:
        fd: an existing file, opened by `Platform.open_direct`; closed with this.
        put: writes through the page cache: (offset, bytes).
    """

    def __init__(self, fd: int, put: Callable[[int, memoryview], None]) -> None:
        self._fd = fd
        self._put = put
        self._lock = threading.Lock()
        self._parts: dict[int, list[tuple[int, bytes]]] = {}
        self._own = threading.local()

    def write_at(self, offset: int, view: memoryview) -> None:
        """Put bytes at `offset`; without a copy where their address is as far into a page as `offset` is."""
        end = offset + view.nbytes
        first, last = -(-offset // PAGE_NBYTES) * PAGE_NBYTES, end // PAGE_NBYTES * PAGE_NBYTES
        if first > last:
            self._keep(offset, view)
            return
        self._keep(offset, view[: first - offset])
        self._keep(last, view[last - offset :])
        self._write_pages(first, view[first - offset : last - offset])

    def finish(self) -> None:
        """Write the pages that did not become whole; after all else."""
        with self._lock:
            parts, self._parts = self._parts, {}
        for page in sorted(parts):
            self._write_parts(parts[page])

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def _write_pages(self, offset: int, pages: memoryview) -> None:
        if not pages.nbytes:
            return
        if not pages.readonly and address_of(pages) % PAGE_NBYTES == 0:
            self._write_aligned(offset, pages)
            return
        if not hasattr(self._own, "bounce"):
            self._own.bounce = memory_at(0, _BOUNCE_NBYTES)
        for done in range(0, pages.nbytes, _BOUNCE_NBYTES):
            block = pages[done : done + _BOUNCE_NBYTES]
            aligned = self._own.bounce[: block.nbytes]
            aligned[:] = block
            self._write_aligned(offset + done, aligned)

    def _write_aligned(self, offset: int, pages: memoryview) -> None:
        done = 0
        try:
            while done < pages.nbytes:
                done += os.pwrite(self._fd, pages[done : done + _MOST_AT_ONCE], offset + done)
        except OSError as error:
            # The disk wants larger pages than ours, or wrote a part of one only.
            if error.errno != errno.EINVAL:
                raise
            self._put(offset + done, pages[done:])

    def _keep(self, offset: int, part: memoryview) -> None:
        """A part of one page."""
        if not part.nbytes:
            return
        page = offset // PAGE_NBYTES
        with self._lock:
            parts = self._parts.setdefault(page, [])
            parts.append((offset, bytes(part)))
            if sum(len(data) for _, data in parts) < PAGE_NBYTES:
                return
            del self._parts[page]
        self._write_parts(parts)

    def _write_parts(self, parts: list[tuple[int, bytes]]) -> None:
        for offset, data in parts:
            self._put(offset, memoryview(data))


def open_direct(path: str, nbytes: int | None, put: Callable[[int, memoryview], None]) -> DirectFile | None:
    """A file to be written past the page cache; None where that is not possible or does not pay.

    Args:
        path: an existing file, empty or reserved.
        nbytes: its size, if known.
        put: see DirectFile.
    """
    if nbytes is None or nbytes < LEAST_NBYTES or not os.path.exists(_MOUNTS):
        return None
    try:
        status = os.stat(path)
        # Page cache and disk would hold different parts of a block that is larger than a page.
        if status.st_blksize > PAGE_NBYTES or _file_system_of(status.st_dev) not in _FILE_SYSTEMS:
            return None
        fd = platform().open_direct(path)
        return None if fd is None else DirectFile(fd, put)
    except OSError:
        return None


def _file_system_of(device: int) -> str | None:
    """The type of the file system on a device; see proc_pid_mountinfo(5)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open(_MOUNTS, encoding="utf-8", errors="replace") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted:
                return right.split()[0]
    return None


def address_of(view: memoryview) -> int:
    """Where writable memory begins."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(view))
