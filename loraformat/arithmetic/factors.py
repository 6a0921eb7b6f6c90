"""Factors of a product, laid out for the compiled loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

COLUMNS = 16
"""Columns that the compiled loop computes together; as in loops.c."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The sum of several products as one, ready for any number of windows.

    Attributes:
        left: (rows, rank) float64, rank the sum of all ranks.
        right: (blocks, rank, 16) float64: columns in blocks of 16, the last filled up with zeros.
        cols: columns of the product.
    """

    left: Floats
    right: Floats
    cols: int

    @property
    def rank(self) -> int:
        """Terms of each sum."""
        return int(self.left.shape[1])

    def right_matrix(self) -> Floats:
        """The right factor as it was given, (rank, cols); a copy."""
        blocks, rank, width = self.right.shape
        matrix: Floats = self.right.transpose(1, 0, 2).reshape(rank, blocks * width)[:, : self.cols]
        return matrix


def pack(left: Floats, right: Floats) -> Packed:
    """Factors made ready once for all windows of a weight.

    >>> import numpy as np
    >>> pack(np.ones((3, 2)), np.ones((2, 20))).right.shape
    (2, 2, 16)

    Args:
        left, right: (rows, rank) and (rank, cols), finite; scales are already in them.
    """
    import numpy as np

    rank, cols = right.shape
    blocks = -(-cols // COLUMNS)
    filled = np.zeros((rank, blocks * COLUMNS))
    filled[:, :cols] = right
    packed = filled.reshape(rank, blocks, COLUMNS).transpose(1, 0, 2)
    return Packed(np.ascontiguousarray(left, np.float64), np.ascontiguousarray(packed), cols)
