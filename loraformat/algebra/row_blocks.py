"""Matrices computed one block of rows at a time, and their leading singular values without holding them in memory.

Blocks have one height, counted from the first row, independent of the available memory: sums over them then have a
fixed order, so their last bits depend on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loraformat.algebra.counted_random import gaussian, key_of
from loraformat.algebra.decomposition import Decomposition, decomposed
from loraformat.algebra.rank_rules import RankRule

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

HEIGHT = 256
_HELD_NBYTES = 256 << 20  # up to which a matrix is computed once and not once a pass
_EXACT = 512  # rows or columns up to which a matrix is decomposed whole
_OVERSAMPLE = 16
_FIRST_RANK = 32
PASSES = 4
# Below this share of a squared norm a difference of squared norms has lost too many digits.
_CANCELLED = 1e-4


class RowBlocks(Protocol):
    """A matrix whose rows are computed when they are asked for."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""

    def block(self, start: int, stop: int) -> Floats:
        """Rows `start:stop`, where `start` is a multiple of HEIGHT."""


def places(rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of so many rows."""
    return ((start, min(start + HEIGHT, rows)) for start in range(0, rows, HEIGHT))


def block_at(start: int) -> int:
    """The number of the block that begins with a row."""
    return start // HEIGHT


@dataclass(frozen=True, slots=True)
class InMemory:
    """A matrix in memory."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.values.shape[0], self.values.shape[1]

    def block(self, start: int, stop: int) -> Floats:
        """As `RowBlocks` has it."""
        return self.values[start:stop]


def held(source: RowBlocks) -> InMemory:
    """All of a matrix."""
    import numpy as np

    if isinstance(source, InMemory):
        return source

    found = np.empty(source.shape)
    for start, stop in places(source.shape[0]):
        found[start:stop] = source.block(start, stop)
    return InMemory(found)


def leading(
    source: RowBlocks, rule: RankRule, passes: int = PASSES, *, seed: int = 0, held_nbytes: int = _HELD_NBYTES
) -> Decomposition:
    """The leading singular values and vectors of a matrix, as many as a rule needs and some more.

    A small matrix, and one of which a quarter of all values are wanted, is decomposed whole. Of others a block Krylov
    space on the side of the columns is spanned (Musco and Musco 2015): each pass over the rows is one power of ΔᵀΔ.
    What the space leaves out is summed as squares in the last pass, so `residual` is exact. With 4 passes the error is
    within 0.2 % of the optimum for spectra from flat to steep, with 3 within 0.6 %.

    Args:
        passes: over the rows, at least 2.
        seed: of the random directions from which the space grows.
        held_nbytes: a matrix of at most so many bytes in float64 is computed once and not once a pass; the bytes of
            the result do not depend on it.

    >>> import numpy as np
    >>> found = leading(InMemory(np.diag([3.0, 2.0, 1.0])), RankRule(rank=1))
    >>> found.values, found.residual
    (array([3., 2., 1.]), 0.0)
    """
    rows, cols = source.shape
    if rows * cols * 8 <= held_nbytes:
        source = held(source)
    count = (rule.rank or rule.max_rank or _FIRST_RANK) + _OVERSAMPLE
    while min(rows, cols) > _EXACT and count <= min(rows, cols) // 4:
        found = _krylov(source, count, passes, seed)
        if rule.holds_within(found):
            return found
        count *= 2
    return decomposed(held(source).values)


def _krylov(source: RowBlocks, count: int, passes: int, seed: int) -> Decomposition:
    import numpy as np

    rows, cols = source.shape
    directions = gaussian(key_of(seed, "range finder", rows, cols), cols, count)
    directions = np.linalg.qr(directions)[0]
    spanned = []
    for _ in range(passes - 1):
        powers = np.zeros((cols, count))
        for start, stop in places(rows):
            values = source.block(start, stop)
            powers += values.T @ (values @ directions)
        directions = np.linalg.qr(powers)[0]
        spanned.append(directions)
    basis = np.linalg.qr(np.concatenate(spanned, axis=1))[0]
    projected, squares = np.empty((rows, basis.shape[1])), []
    for start, stop in places(rows):
        values = source.block(start, stop)
        inside = values @ basis
        projected[start:stop] = inside
        whole = float(np.vdot(values, values))
        outside = whole - float(np.vdot(inside, inside))
        if outside < _CANCELLED * whole:
            values = values - inside @ basis.T
            outside = float(np.vdot(values, values))
        squares.append(outside)
    inner = decomposed(projected)
    return Decomposition(inner.left, inner.values, inner.right @ basis.T, math.sqrt(math.fsum(squares)))
