"""The difference of two weights by blocks of rows, and what the rounding of the second leaves in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.algebra.decomposition import Decomposition
from loraformat.algebra.factors import Product
from loraformat.algebra.row_blocks import InMemory, RowBlocks, places
from loraformat.model.floats import unit_in_last_place
from loraformat.model.tensors import DType, Readable, rounded

if TYPE_CHECKING:
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values


_ALL_ROWS, _SAMPLED_ROWS = 1024, 32  # of a block of 256


@dataclass(frozen=True, slots=True)
class Difference:
    """W' − W of two weights of one shape, in float64; axes behind the first are flattened.

    >>> import numpy as np
    >>> from loraformat.model.tensors import LazyTensor
    >>> before, after = (LazyTensor.of(np.full((2, 2), value, np.float32)) for value in (1, 3))
    >>> Difference(before, after).block(0, 1)
    array([[2., 2.]])

    Attributes:
        before: W.
        after: W'.
    """

    before: Readable
    after: Readable

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.before.shape[0], math.prod(self.before.shape[1:])

    def block(self, start: int, stop: int) -> Floats:
        """As `RowBlocks` has it."""
        found = matrix_of(self.after.read(start, stop))
        found -= matrix_of(self.before.read(start, stop))
        return found


def matrix_of(values: Values) -> Floats:
    """Rows as a matrix in float64, in memory of its own."""
    import numpy as np

    return np.array(values.reshape(len(values), -1), np.float64)


@dataclass(frozen=True, slots=True)
class Measure:
    """What one pass over a difference tells.

    Attributes:
        norm: ‖W' − W‖.
        floor: the norm that the rounding of W' to its dtype is expected to have in it: √Σ ulp(W')² / 12, the standard
            deviation of an error that is equally likely anywhere within half a unit in the last place. 0 where no
            value differs.
        is_finite: whether all values of both are finite.
    """

    norm: float
    floor: float
    is_finite: bool


def measure(difference: Difference, held_nbytes: int = 0) -> tuple[Measure, RowBlocks]:
    """The norm of a difference and its floor, from one pass over the rows; and the difference, to go on with.

    Args:
        held_nbytes: a difference of at most so many bytes in float64 is kept, so that nothing is read again.
    """
    import numpy as np

    rows, cols = difference.shape
    kept = np.empty((rows, cols)) if rows * cols * 8 <= held_nbytes else None
    squares, noise, is_finite = [], [], True
    for start, stop in places(rows):
        after = matrix_of(difference.after.read(start, stop))
        steps = unit_in_last_place(after, difference.after.dtype)
        with np.errstate(invalid="ignore"):
            after -= matrix_of(difference.before.read(start, stop))
        is_finite = is_finite and bool(np.isfinite(after).all())
        squares.append(float(np.vdot(after, after)))
        noise.append(float(np.vdot(steps, steps)))
        if kept is not None:
            kept[start:stop] = after
    norm = math.sqrt(math.fsum(squares)) if is_finite else math.nan
    found = Measure(norm, math.sqrt(math.fsum(noise) / 12) if norm else 0.0, is_finite)
    return found, difference if kept is None else InMemory(kept)


def transposed(found: Decomposition) -> Decomposition:
    """The decomposition of the transpose."""
    return Decomposition(found.right.T, found.values, found.left.T, found.residual)


def retained(before: Readable, change: Product, dtype: DType) -> tuple[float, float]:
    """(Σ (round(W + D) − W)·D, ΣD²): their quotient is the share of D that is left where W + D is rounded to a dtype.

    Of a matrix with more than 1024 rows an eighth of those behind is looked at.

    Args:
        before: W.
        change: D, as W is stored.
    """
    import numpy as np

    kept, squares = [], []
    for start, end in places(change.shape[0]):
        stop = end if start < _ALL_ROWS else min(end, start + _SAMPLED_ROWS)
        base, update = matrix_of(before.read(start, stop)), change.left[start:stop] @ change.right
        written = rounded(base + update, dtype).astype(np.float64) - base
        kept.append(float((written * update).sum()))
        squares.append(float(np.square(update).sum()))
    return math.fsum(kept), math.fsum(squares)
