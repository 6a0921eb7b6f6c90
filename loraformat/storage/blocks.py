"""Copying through memory, for stores between which the kernel cannot copy."""

from __future__ import annotations

from loraformat.storage.base import Source, Writer
from loraformat.storage.direct import PAGE_NBYTES, memory_at

BLOCK_NBYTES = 4 << 20


def copy_blocks(writer: Writer, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
    """Put `nbytes` bytes of `source`'s file `path` at `offset`, through one buffer of at most 4 MiB.

    Raises: StorageError: the file ends before, or cannot be read or written.
    """
    buffer = memory_at(offset % PAGE_NBYTES, min(nbytes, BLOCK_NBYTES))
    for done in range(0, nbytes, BLOCK_NBYTES):
        block = buffer[: min(BLOCK_NBYTES, nbytes - done)]
        source.read_into(path, source_offset + done, block)
        writer.write_at(offset + done, block)
