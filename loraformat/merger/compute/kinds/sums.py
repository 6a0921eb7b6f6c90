"""Updates that add or set values, made ready for blocks of rows: factors, dense deltas, tables. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.arithmetic import multiply
from loraformat.matching import WHOLE
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Addition, Delta, Overwrite, Step, finite, product_of, stated_scale
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Rows, Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats


def low_rank(update: LowRank, place: Placement) -> Addition:
    """S · up @ down, and with a magnitude DoRA."""
    transposed, part = place.transposed, place.part
    factors = update.expert(part.expert or 0) if update.is_stack else (update.up, update.down)
    up, down = (_values(factor, place) for factor in factors)
    left, right = (down.T, up.T) if transposed else (up, down)
    is_per_row = update.magnitude is None or (update.magnitude.axis == 1) != transposed
    magnitude = _magnitude(update, is_per_row, place)
    if part.rows is not None:
        rows = slice(*part.rows)
        left, magnitude = left[rows], None if magnitude is None else magnitude[rows]
    span = None if part == WHOLE else (part.at, part.at + left.shape[0])
    return Addition(product_of(left * _factor(update, place), right), magnitude, is_per_row, span)


def dense(update: Dense, place: Placement) -> Addition:
    """S · delta."""
    scale, lazy, part = _factor(update, place), update.delta, place.part
    lazy = lazy.T if place.transposed else lazy
    lazy = lazy if part.rows is None else lazy.rows(*part.rows)
    span = None if part == WHOLE else (part.at, part.at + lazy.shape[0])
    where, cols = place.where, place.shape[1]
    return Addition(lambda a, b: finite(lazy.read(a, b), where).reshape(b - a, cols) * scale, span=span)


def _hadamard(update: Hadamard, place: Placement) -> Addition:
    first, second = (_oriented(up, down, place) for up, down in update.products)
    scale = _factor(update, place)
    return Addition(lambda a, b: first(a, b) * second(a, b) * scale)


def _kronecker(update: Kronecker, place: Placement) -> Addition:
    """Rows of kron(L, R): row i is L[i // c] ⊗ R[i % c], c the rows of R."""
    import numpy as np

    left, right = (_side(factors, place) for factors in (update.left, update.right))
    if place.transposed:
        left, right = left.T, right.T
    scale, count = _factor(update, place), right.shape[0]

    def delta(start: int, stop: int) -> Floats:
        numbers = np.arange(start, stop)
        outer, inner = left[numbers // count], right[numbers % count]
        found: Floats = (outer[:, :, None] * inner[:, None, :]).reshape(stop - start, -1)
        found *= scale
        return found

    return Addition(delta)


def _replace(update: Replace, place: Placement) -> Overwrite:
    value = update.value.T if place.transposed else update.value
    where, cols = place.where, place.shape[1]

    def rows(start: int, stop: int) -> tuple[slice, Floats]:
        return slice(None), finite(value.read(start, stop), where).reshape(stop - start, cols)

    return Overwrite(rows, value)


def _rows(update: Rows, place: Placement) -> Overwrite:
    """Rows of the table are read when they are needed: of a trained vocabulary they are many."""
    import numpy as np

    values, where, cols = update.values, place.where, place.shape[1]
    indices = np.asarray(update.indices, np.int64)

    def rows(start: int, stop: int) -> tuple[NDArray[np.int64], Floats]:
        here = np.flatnonzero((indices >= start) & (indices < stop))
        runs = np.split(here, np.flatnonzero(np.diff(here) != 1) + 1) if len(here) else []
        found = [finite(values.read(int(run[0]), int(run[-1]) + 1), where).reshape(len(run), cols) for run in runs]
        return indices[here] - start, np.concatenate([np.empty((0, cols)), *found])

    return Overwrite(rows)


# How each of these kinds is made ready, by its class.
SUMS: Mapping[type[Update], Callable[[Any, Placement], Step]] = {
    LowRank: low_rank,
    Hadamard: _hadamard,
    Kronecker: _kronecker,
    Dense: dense,
    Replace: _replace,
    Rows: _rows,
}


def _factor(update: LowRank | Hadamard | Kronecker | Dense, place: Placement) -> float:
    """Scale and strength together."""
    return stated_scale(update.scale, place.where) * place.strength


def _oriented(up: LazyTensor, down: LazyTensor, place: Placement) -> Delta:
    left, right = (_values(factor, place) for factor in (up, down))
    if place.transposed:
        left, right = right.T, left.T
    return product_of(left, right)


def _side(factors: tuple[LazyTensor, ...], place: Placement) -> Floats:
    values = [_values(factor, place) for factor in factors]
    return values[0] if len(values) == 1 else multiply(values[0], values[1])


def _magnitude(update: LowRank, is_per_row: bool, place: Placement) -> Floats | None:
    if update.magnitude is None:
        return None
    vector = finite(update.magnitude.vector.load(), place.where).reshape(-1)
    return vector[:, None] if is_per_row else vector[None, :]


def _values(factor: LazyTensor, place: Placement) -> Floats:
    """All values of a factor, trailing axes flattened (a convolution's kernel)."""
    value = finite(factor.load(), place.where)
    return value.reshape(value.shape[0], math.prod(value.shape[1:]))
