"""Factors of a product, laid out for the compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

COLUMNS = 16
"""Columns that the compiled loop computes together; as in loops.c."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """The right factor in float32, and what bounds the error of products with it; for the compiled loop alone.

    Attributes:
        right: as that of `Packed`.
        bound: (blocks, 16) float32, the weighted norm of each column.
        squares: float64; the first `rank` are the sums of the squares of each row.
        is_exact: whether float32 holds every number of the factor.
    """

    right: NDArray[np.float32]
    bound: NDArray[np.float32]
    squares: Floats
    is_exact: bool


@dataclass(slots=True)
class _Once:
    """What the first thread that needs it makes for all."""

    lock: Lock = field(default_factory=Lock)
    made: Narrow | None = None


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
    _narrow: _Once = field(default_factory=_Once, init=False, repr=False, compare=False)

    def narrow(self, make: Callable[[Packed], Narrow]) -> Narrow:
        """The right factor in float32: made at the first call, and then the same for all windows and threads."""
        with self._narrow.lock:
            if self._narrow.made is None:
                self._narrow.made = make(self)
            return self._narrow.made

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
