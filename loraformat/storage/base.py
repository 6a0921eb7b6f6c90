"""Bytes by path. Knows nothing of tensors or LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol


class Writer(Protocol):
    """A file that is being written; it appears under its name when its context ends without an exception."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; any order, from any thread."""

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """Put `nbytes` bytes of `source`'s file `path` at `offset`, inside the kernel where both are local."""


class Source(Protocol):
    """What can be read of one folder (not of its subfolders), or of one file alone. One opening is one state of it."""

    uri: str

    def files(self) -> Mapping[str, int]:
        """Regular files by name → size in bytes, sorted."""

    def folders(self) -> tuple[str, ...]:
        """Names of subfolders, sorted; hidden ones left out. Their content cannot be reached from here."""

    def size(self, path: str) -> int:
        """Bytes of one file, without looking at the others. Raises StorageError where there is none."""

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """A range of a file, or from `offset` to its end. A range that the file does not have raises StorageError."""

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises StorageError when the file ends before."""


class Store(Source, Protocol):
    """A folder that can be written to as well."""

    def create(self, path: str, size: int | None = None) -> AbstractContextManager[Writer]:
        """A new file; `size`, where known, is reserved first, so that a full disk shows at once."""
