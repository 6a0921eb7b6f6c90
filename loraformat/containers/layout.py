"""The layout of a file to write: the position of each tensor, known before any value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from loraformat.model.tensors import Entry


class Layout(Protocol):
    """A planned tensor file, made by `plan_file`; equal arguments, equal layout."""

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor, aliases included → its dtype, shape and bytes in the file."""

    @property
    def needs_checksums(self) -> bool:
        """Whether `frame` wants the CRC-32 of each tensor's bytes."""

    def frame(self, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Everything in the file that is not tensor data, as (offset, bytes): headers, padding, directories.

        Args:
            checksums: name → CRC-32 of the tensor's bytes, for every tensor that is not an alias; {} where
                `needs_checksums` is false.
        """
