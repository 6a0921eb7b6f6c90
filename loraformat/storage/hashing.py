"""The fast hash of the project, BLAKE3, over bytes in memory and ranges of files. Imported when the first is asked for.

Why this one: docs/decisions/0009-digests.md.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from loraformat.storage.base import Source
from loraformat.storage.blocks import BLOCK_NBYTES
from loraformat.storage.direct import memory_at

ALGORITHM = "blake3"


class Hash(Protocol):
    """A hash in the making; the interpreter lock is released while it takes large blocks."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far."""


class Run(NamedTuple):
    """Bytes of a file that stand together, and their digest: 64 hexadecimal digits."""

    offset: int
    nbytes: int
    digest: str

    @property
    def end(self) -> int:
        """The first byte after the run."""
        return self.offset + self.nbytes


def new_hash() -> Hash:
    """An empty BLAKE3."""
    from blake3 import blake3

    return blake3()


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """The digest of bytes in memory.

    >>> digest_of(b"")[:8]
    'af1349b9'
    """
    total = new_hash()
    total.update(data)
    return total.hexdigest()


def digest_of_range(store: Source, name: str, offset: int, nbytes: int) -> str:
    """The digest of a range of a file, read a few MiB at a time.

    Raises: StorageError: the file ends before, or cannot be read.
    """
    total, buffer = new_hash(), memory_at(0, max(1, min(nbytes, BLOCK_NBYTES)))
    for done in range(0, nbytes, BLOCK_NBYTES):
        block = buffer[: min(BLOCK_NBYTES, nbytes - done)]
        store.read_into(name, offset + done, block)
        total.update(block)
    return total.hexdigest()


def uncovered(runs: list[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """The (start, stop) of a file of `nbytes` bytes that lie in none of the (start, stop) in `runs`.

    >>> uncovered([(2, 4), (3, 6)], 8)
    [(0, 2), (6, 8)]
    """
    position, gaps = 0, []
    for start, stop in [*sorted(runs), (nbytes, nbytes)]:
        if start > position:
            gaps.append((position, min(start, nbytes)))
        position = max(position, stop)
    return gaps
