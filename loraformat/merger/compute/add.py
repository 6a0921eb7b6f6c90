"""The arithmetic of a merge, on blocks of rows of one stored tensor. Knows no files.

A block is computed in tiles of `TILE` rows counted from row 0 of the tensor. Matrix products of other heights may take
another code path and differ in the last bit, so neither the window nor the number of threads shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, Union

from typing_extensions import assert_never

from loraformat.errors import MergeError
from loraformat.matching import WHOLE, Part
from loraformat.merger.compute.multiply import (
    Multiplication,
    common_unit,
    finite,
    prepare_factor,
)
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base_dependent import Carried, Projected, Recoded, Tiled
from loraformat.model.updates.kinds import (
    Diff,
    FromBase,
    Hadamard,
    Kronecker,
    LowRank,
    Modulated,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 64

Delta: TypeAlias = Callable[[int, int], "Tensor"]


@dataclass(frozen=True, slots=True)
class Product:
    """A Delta that is rows of left @ right, told by its factors so that a product can go into memory that is there."""

    left: Tensor
    right: Tensor

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`."""
        return self.left[start:stop] @ self.right


@dataclass(frozen=True, slots=True)
class Addition:
    """A term that adds: `delta(start, stop)` are rows of s·ΔW as stored, (stop - start, cols).

    Attributes:
        magnitude: DoRA, in the stored orientation: (rows, 1) where `is_per_row`, else (1, cols); else None.
        is_per_row: whether each stored row has its norm; if not, each column has, and a whole pass must come first.
        span: (start, stop) of the rows of the tensor that it adds to, from which `delta` and `magnitude` count; None
            for all.
    """

    delta: Delta
    magnitude: Tensor | None = None
    is_per_row: bool = True
    span: tuple[int, int] | None = None

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude."""
        return self.magnitude is not None

    @property
    def needs_column_norms(self) -> bool:
        """Whether norms run over all rows of the stored tensor."""
        return self.is_dora and not self.is_per_row


@dataclass(frozen=True, slots=True)
class Overwrite:
    """A term that sets rows: `rows(start, stop)` gives (row numbers from `start` on, their values)."""

    rows: Callable[[int, int], tuple[Tensor, Tensor]]


Step: TypeAlias = Union[Addition, Overwrite, Multiplication]


def prepare(
    update: Update,
    transposed: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    where: str,
    part: Part = WHOLE,
    strength: float = 1.0,
) -> Step:
    """An update made ready for blocks of a stored tensor.

    Args:
        update: in Linear orientation.
        transposed: whether the tensor is stored as (in, out).
        shape: (rows, cols) of the stored tensor, its trailing axes flattened; one column for a vector.
        dtype: in which it is computed, float32 or float64.
        where: for messages.
        part: which rows of the update are taken, and to which rows of the tensor they go.
        strength: by which what is added is multiplied.

    Raises:
        NonFiniteValue (LF402): a factor holds NaN or infinity.
        MergeError (LF206): the scale is unknown.
    """
    match update:
        case LowRank():
            return _low_rank(update, transposed, dtype, where, part, strength)
        case Hadamard():
            first = _oriented(update.up1, update.down1, transposed, dtype, where)
            second = _oriented(update.up2, update.down2, transposed, dtype, where)
            scale = stated_scale(update.scale, where) * strength
            return Addition(lambda a, b: (first(a, b) * second(a, b)).mul_(scale))
        case Kronecker():
            return Addition(_kronecker(update, transposed, dtype, where, strength))
        case Diff():
            scale, lazy = stated_scale(update.scale, where) * strength, update.difference
            lazy = lazy.T if transposed else lazy
            lazy = lazy if part.rows is None else lazy.rows(*part.rows)
            span = None if part == WHOLE else (part.at, part.at + lazy.shape[0])
            return Addition(
                lambda a, b: finite(lazy.read(a, b).to(dtype), where).reshape(b - a, shape[1]) * scale, span=span
            )
        case Replace():
            return Overwrite(_replacement(update.value.T if transposed else update.value, shape[1], dtype, where))
        case Rows():
            return Overwrite(_some_rows(update, dtype, where))
        case FromBase() | Projected() | Recoded() | Carried():
            raise AssertionError("resolved by `from_base` before")
        case Scaled() | Rotated() | Multiplied() | Modulated() | Tiled():
            return prepare_factor(update, transposed, shape, dtype, where)
        case _:
            assert_never(update)


def _low_rank(
    update: LowRank, transposed: bool, dtype: torch.dtype, where: str, part: Part, strength: float
) -> Addition:
    factors = update.expert(part.expert or 0) if update.is_stack else (update.up, update.down)
    up, down = (_values(factor, dtype, where) for factor in factors)
    left, right = (down.T, up.T) if transposed else (up, down)
    is_per_row = update.magnitude is None or (update.magnitude.axis == 1) != transposed
    magnitude = _magnitude(update, is_per_row, dtype, where)
    if part.rows is not None:
        rows = slice(*part.rows)
        left, magnitude = left[rows], None if magnitude is None else magnitude[rows]
    left = left.contiguous() * (stated_scale(update.scale, where) * strength)
    span = None if part == WHOLE else (part.at, part.at + left.shape[0])
    return Addition(_product(left, right.contiguous()), magnitude, is_per_row, span)


def apply(window: Tensor, start: int, steps: Sequence[Step], column_norms: Sequence[Tensor | None]) -> Tensor:
    """A block of whole rows with all terms applied, each product in tiles.

    Args:
        window: (k, cols) float32 or float64, rows from `start` on, a multiple of TILE and of the steps' units. Changed
            in place.
        steps: in order. Norms of DoRA are those of the weight that its adapter was trained on: the base's, with what
            overwrites it, before other updates are added; so are the values that an update changes as a sum.
        column_norms: for each step that needs them (1, cols), else None.
    Returns: `window`, not rounded yet.
    """
    stop = start + window.shape[0]
    units = [step.unit for step in steps if isinstance(step, Multiplication)]
    for low, high in blocks_of(start, stop, common_unit([TILE, *units], stop)):
        block = window[low - start : high - start]
        for step in steps:
            if isinstance(step, Overwrite):
                _overwrite(block, step, low, high)
        origin = block.clone() if any(_needs_origin(step) for step in steps) and len(steps) > 1 else block
        for step, norms in zip(steps, column_norms, strict=True):
            if not isinstance(step, Overwrite):
                _change(block, origin, step, norms, low)
    return window


def _change(block: Tensor, origin: Tensor, step: Addition | Multiplication, norms: Tensor | None, start: int) -> None:
    """One step on a block that begins at row `start`, in tiles, or in the units of a product that mixes rows."""
    height = step.unit if isinstance(step, Multiplication) and step.unit > 1 else TILE
    for low, high in blocks_of(start, start + block.shape[0], height):
        tile = block[low - start : high - start]
        if isinstance(step, Multiplication) and step.is_sum:
            base = origin[low - start : high - start]
            tile += step.turn(base, low, high).sub_(base)
        elif isinstance(step, Multiplication):
            tile.copy_(step.turn(tile, low, high))
        else:
            _add_where(tile, origin[low - start : high - start], step, norms, low, high)


def _add_where(tile: Tensor, origin: Tensor, step: Addition, norms: Tensor | None, low: int, high: int) -> None:
    """`_add` on the rows of the tile that the step adds to."""
    if step.span is None:
        _add(tile, origin, step, norms, low, high)
        return
    first, start, stop = step.span[0], max(low, step.span[0]), min(high, step.span[1])
    if start < stop:
        rows = slice(start - low, stop - low)
        _add(tile[rows], origin[rows], step, norms, start - first, stop - first)


def add_column_squares(total: Tensor, window: Tensor, start: int, steps: Sequence[Step], wanted: Addition) -> None:
    """Add Σ over rows of (W + ΔW)² for one DoRA step to `total`, tile by tile, so that windows do not show.

    Args:
        total: (1, cols) float64.
        window, start, steps: as for `apply`; `window` is changed.
        wanted: the step whose norms these are.
    """
    import torch

    for low, high in blocks_of(start, start + window.shape[0], TILE):
        tile = window[low - start : high - start]
        for step in steps:
            if isinstance(step, Overwrite):
                _overwrite(tile, step, low, high)
        total += (tile + wanted.delta(low, high)).to(torch.float64).square().sum(dim=0, keepdim=True)


def blocks_of(start: int, stop: int, height: int) -> Iterator[tuple[int, int]]:
    """(low, high) of the blocks of `height` rows from `start` to `stop`; the last may be lower."""
    for low in range(start, stop, height):
        yield low, min(low + height, stop)


def _needs_origin(step: Step) -> bool:
    return step.is_sum if isinstance(step, Multiplication) else isinstance(step, Addition) and step.is_dora


def _overwrite(tile: Tensor, step: Overwrite, low: int, high: int) -> None:
    numbers, values = step.rows(low, high)
    tile[numbers] = values


def _add(tile: Tensor, origin: Tensor, step: Addition, norms: Tensor | None, low: int, high: int) -> None:
    """`tile += Δ`, or for DoRA `tile = f · (tile + Δ)` with f = m / ‖W + Δ‖ (peft 0.21.2, tuners/lora/dora.py)."""
    delta = step.delta(low, high)
    if step.magnitude is None:
        tile += delta
        return
    if norms is None:
        factor = step.magnitude[low:high] / (origin + delta).norm(dim=1, keepdim=True)
    else:
        factor = step.magnitude / norms
    tile += delta
    tile *= factor


def _product(left: Tensor, right: Tensor) -> Delta:
    return Product(left, right)


def _oriented(up: LazyTensor, down: LazyTensor, transposed: bool, dtype: torch.dtype, where: str) -> Delta:
    left, right = (_values(factor, dtype, where) for factor in (up, down))
    if transposed:
        left, right = right.T, left.T
    return _product(left.contiguous(), right.contiguous())


def _kronecker(update: Kronecker, transposed: bool, dtype: torch.dtype, where: str, strength: float = 1.0) -> Delta:
    """Rows of kron(L, R): row i is L[i // c] ⊗ R[i % c], c the rows of R."""
    import torch

    left, right = (_matrix(factors, dtype, where) for factors in (update.left, update.right))
    if transposed:
        left, right = left.T.contiguous(), right.T.contiguous()
    scale, count = stated_scale(update.scale, where) * strength, right.shape[0]

    def delta(start: int, stop: int) -> Tensor:
        numbers = torch.arange(start, stop)
        outer, inner = left[numbers // count], right[numbers % count]
        return (outer[:, :, None] * inner[:, None, :]).flatten(1) * scale

    return delta


def _matrix(factors: tuple[LazyTensor, ...], dtype: torch.dtype, where: str) -> Tensor:
    values = [_values(factor, dtype, where) for factor in factors]
    return values[0] if len(values) == 1 else values[0] @ values[1]


def _magnitude(update: LowRank, is_per_row: bool, dtype: torch.dtype, where: str) -> Tensor | None:
    if update.magnitude is None:
        return None
    vector = finite(update.magnitude.vector.torch().to(dtype), where).flatten()
    return vector[:, None] if is_per_row else vector[None, :]


def _replacement(
    value: LazyTensor, cols: int, dtype: torch.dtype, where: str
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    import torch

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        block = value.read(start, stop) if value.shape else value.torch()
        return torch.arange(stop - start), finite(block.to(dtype), where).reshape(stop - start, cols)

    return rows


def _some_rows(update: Rows, dtype: torch.dtype, where: str) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    import torch

    values = _values(update.values, dtype, where)
    indices = torch.tensor(update.indices, dtype=torch.int64)

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        here = (indices >= start) & (indices < stop)
        return indices[here] - start, values[here]

    return rows


def _values(factor: LazyTensor, dtype: torch.dtype, where: str) -> Tensor:
    """All values of a factor, trailing axes flattened (a convolution's kernel)."""
    value = finite(factor.torch().to(dtype), where)
    return value.reshape(value.shape[0], math.prod(value.shape[1:]))


def stated_scale(scale: float | None, where: str) -> float:
    """The scale; raises MergeError (LF206) where it is unknown."""
    if scale is None:
        raise MergeError("the scale is unknown: nobody stated alpha", where=where, hint="give it with --alpha A")
    return scale
