"""Directions removed from weights: W − λ D Dᵀ W on the output side, W − λ W D Dᵀ on the input side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.algebra.factors import Product
from loraformat.algebra.row_blocks import InMemory, RowBlocks, held, places
from loraformat.algebra.weights.difference import matrix_of
from loraformat.model.tensors import Readable

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# Directions that others give up to so much of their length, the rounding of float32, add nothing to the span.
_DEPENDENT = 1e-6


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as it is read, by blocks of rows in float64; axes behind the first are flattened."""

    weight: Readable

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.weight.shape[0], math.prod(self.weight.shape[1:])

    def block(self, start: int, stop: int) -> Floats:
        """As `RowBlocks` has it."""
        return matrix_of(self.weight.read(start, stop))


def in_linear_orientation(source: RowBlocks, *, is_transposed: bool) -> RowBlocks:
    """The matrix of a layer as (out, in); one that is stored the other way is held as a whole."""
    import numpy as np

    return InMemory(np.ascontiguousarray(held(source).values.T)) if is_transposed else source


def span_of(directions: Floats) -> Floats:
    """An orthonormal basis of what directions span: (features, rank).

    >>> import numpy as np
    >>> span_of(np.array([[0.0, 3.0], [0.0, -1.0]])).shape
    (2, 1)

    Args:
        directions: (count, features), each finite and not zero; their lengths do not matter.
    """
    import numpy as np

    units = directions / np.linalg.norm(directions, axis=1)[:, None]
    _, values, basis = np.linalg.svd(units, full_matrices=False)
    found: Floats = basis[values > _DEPENDENT * values[0]].T
    return found


def removed_from_output(source: RowBlocks, basis: Floats, strength: float) -> Product:
    """−λ D DᵀW, where D is over the rows of W.

    Source: the projection of representation engineering; Arditi et al. 2024, arXiv 2406.11717, section 2.4.
    """
    import numpy as np

    reads = np.zeros((basis.shape[1], source.shape[1]))
    for start, stop in places(source.shape[0]):
        reads += basis[start:stop].T @ source.block(start, stop)
    return Product(-strength * basis, reads)


def removed_from_input(source: RowBlocks, basis: Floats, strength: float) -> Product:
    """−λ W D Dᵀ, where D is over the columns of W."""
    import numpy as np

    writes = np.empty((source.shape[0], basis.shape[1]))
    for start, stop in places(source.shape[0]):
        writes[start:stop] = source.block(start, stop) @ basis
    return Product(-strength * writes, basis.T)


@dataclass(frozen=True, slots=True)
class NormKeeping:
    """What a removal changes where every row of W keeps its length: a matrix of full rank, by blocks of rows.

    The directions are taken out of W with rows of length 1, and each row then gets its old length back. A row of which
    nothing is left stays zero.

    Attributes:
        source: W.
        removal: what the removal adds to W with rows of length 1, `UnitRows`.
    """

    source: RowBlocks
    removal: Product

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.source.shape

    def block(self, start: int, stop: int) -> Floats:
        """As `RowBlocks` has it."""
        whole = self.source.block(start, stop)
        norms = _lengths(whole)
        turned = whole / _or_one(norms) + self.removal.left[start:stop] @ self.removal.right
        turned *= norms / _or_one(_lengths(turned))
        turned -= whole
        return turned


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A matrix with rows of length 1; rows of zeros stay."""

    source: RowBlocks

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.source.shape

    def block(self, start: int, stop: int) -> Floats:
        """As `RowBlocks` has it."""
        whole = self.source.block(start, stop)
        return whole / _or_one(_lengths(whole))


def _lengths(rows: Floats) -> Floats:
    import numpy as np

    found: Floats = np.linalg.norm(rows, axis=1)[:, None]
    return found


def _or_one(lengths: Floats) -> Floats:
    import numpy as np

    return np.where(lengths == 0, 1.0, lengths)
