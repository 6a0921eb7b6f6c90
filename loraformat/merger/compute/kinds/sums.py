"""Updates that add or set values, made ready for blocks of rows: factors, dense deltas, tables. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.matching import WHOLE
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Addition, Delta, Overwrite, Product, Step, finite, stated_scale
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Rows, Update

if TYPE_CHECKING:
    from torch import Tensor


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
    left = left.contiguous() * _factor(update, place)
    span = None if part == WHOLE else (part.at, part.at + left.shape[0])
    return Addition(Product(left, right.contiguous()), magnitude, is_per_row, span)


def dense(update: Dense, place: Placement) -> Addition:
    """S · delta."""
    scale, lazy, part = _factor(update, place), update.delta, place.part
    lazy = lazy.T if place.transposed else lazy
    lazy = lazy if part.rows is None else lazy.rows(*part.rows)
    span = None if part == WHOLE else (part.at, part.at + lazy.shape[0])
    dtype, where, cols = place.dtype, place.where, place.shape[1]
    return Addition(lambda a, b: finite(lazy.read(a, b).to(dtype), where).reshape(b - a, cols) * scale, span=span)


def _hadamard(update: Hadamard, place: Placement) -> Addition:
    first, second = (_oriented(up, down, place) for up, down in update.products)
    scale = _factor(update, place)
    return Addition(lambda a, b: (first(a, b) * second(a, b)).mul_(scale))


def _kronecker(update: Kronecker, place: Placement) -> Addition:
    """Rows of kron(L, R): row i is L[i // c] ⊗ R[i % c], c the rows of R."""
    import torch

    left, right = (_side(factors, place) for factors in (update.left, update.right))
    if place.transposed:
        left, right = left.T.contiguous(), right.T.contiguous()
    scale, count = _factor(update, place), right.shape[0]

    def delta(start: int, stop: int) -> Tensor:
        numbers = torch.arange(start, stop)
        outer, inner = left[numbers // count], right[numbers % count]
        return (outer[:, :, None] * inner[:, None, :]).flatten(1) * scale

    return Addition(delta)


def _replace(update: Replace, place: Placement) -> Overwrite:
    import torch

    value = update.value.T if place.transposed else update.value
    dtype, where, cols = place.dtype, place.where, place.shape[1]

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        block = value.read(start, stop) if value.shape else value.torch()
        return torch.arange(stop - start), finite(block.to(dtype), where).reshape(stop - start, cols)

    return Overwrite(rows)


def _rows(update: Rows, place: Placement) -> Overwrite:
    import torch

    values = _values(update.values, place)
    indices = torch.tensor(update.indices, dtype=torch.int64)

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        here = (indices >= start) & (indices < stop)
        return indices[here] - start, values[here]

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
    return Product(left.contiguous(), right.contiguous())


def _side(factors: tuple[LazyTensor, ...], place: Placement) -> Tensor:
    values = [_values(factor, place) for factor in factors]
    return values[0] if len(values) == 1 else values[0] @ values[1]


def _magnitude(update: LowRank, is_per_row: bool, place: Placement) -> Tensor | None:
    if update.magnitude is None:
        return None
    vector = finite(update.magnitude.vector.torch().to(place.dtype), place.where).flatten()
    return vector[:, None] if is_per_row else vector[None, :]


def _values(factor: LazyTensor, place: Placement) -> Tensor:
    """All values of a factor, trailing axes flattened (a convolution's kernel)."""
    value = finite(factor.torch().to(place.dtype), place.where)
    return value.reshape(value.shape[0], math.prod(value.shape[1:]))
