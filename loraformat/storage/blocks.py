"""Copying through memory, for stores between which the kernel cannot copy."""

from __future__ import annotations

from collections.abc import Callable

from loraformat.storage.base import Source, Writer
from loraformat.storage.direct import PAGE_NBYTES, memory_at

BLOCK_NBYTES = 4 << 20


def copy_blocks(
    writer: Writer,
    source: Source,
    path: str,
    source_offset: int,
    offset: int,
    nbytes: int,
    on_block: Callable[[memoryview], object] | None = None,
) -> None:
    """Put `nbytes` bytes of `source`'s file `path` at `offset`, through one buffer of at most 4 MiB.

    Args:
        on_block: called with each block before it is written, in order.

    Raises: StorageError: the file ends before, or cannot be read or written.
    """
    buffer = memory_at(offset % PAGE_NBYTES, min(nbytes, BLOCK_NBYTES))
    for done in range(0, nbytes, BLOCK_NBYTES):
        block = buffer[: min(BLOCK_NBYTES, nbytes - done)]
        source.read_into(path, source_offset + done, block)
        if on_block is not None:
            on_block(block)
        writer.write_at(offset + done, block)
