"""Updates that multiply, made ready for blocks of rows: scaling, rotations, reflections, single values. Knows no files.

What mixes the columns of a row needs that row only. What mixes rows needs them together: a whole block of a left
rotation, as it is stored; the window of a merge is a whole number of them (`Kind.row_unit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Multiplication, Transform, finite
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BlockAffine, ElementwiseScale, Multiplied, Rotated, Scaled, Update

if TYPE_CHECKING:
    from torch import Tensor


def _scaled(update: Scaled, place: Placement) -> Multiplication:
    """Factors of rows and columns."""
    rows, columns = (_vector(vector, place) for vector in (update.rows, update.cols))
    if place.transposed:
        rows, columns = columns, rows
    if columns is not None:
        columns = columns.repeat_interleave(place.shape[1] // len(columns))

    def transform(values: Tensor, start: int, stop: int) -> Tensor:
        if rows is not None:
            values = values * rows[start:stop, None]
        return values if columns is None else values * columns

    return Multiplication(transform, is_sum=update.is_sum)


def _rotated(update: Rotated, place: Placement) -> Multiplication:
    """A block-diagonal factor; transposed storage exchanges left and right: (L W)ᵀ = Wᵀ Lᵀ."""
    import torch

    blocks = _all(update.blocks, place)
    if place.transposed:
        blocks = blocks.transpose(1, 2).contiguous()
    order = None if update.order is None else torch.tensor(update.order)
    if (update.side == "left") != place.transposed:
        return Multiplication(_mixed_rows(blocks, order), update.row_unit(place.transposed, place.shape[0]))
    return Multiplication(_mixed_columns(blocks.expand(place.shape[1] // update.size, -1, -1), order))


def _multiplied(update: Multiplied, place: Placement) -> Multiplication:
    """W + (W up) down, row by row; on transposed storage Wᵀ + downᵀ (upᵀ Wᵀ), for which all rows stand together."""
    up, down = (_all(factor, place) for factor in (update.up, update.down))
    if place.transposed:
        left, right = down.T.contiguous(), up.T.contiguous()
        return Multiplication(lambda values, _start, _stop: values + left @ (right @ values), place.shape[0])
    return Multiplication(lambda values, _start, _stop: values + (values @ up) @ down)


def _elementwise_scale(update: ElementwiseScale, place: Placement) -> Multiplication:
    """W + W ∘ (up @ down), row by row, in the memory of the product."""
    up, down = (_all(factor, place) for factor in (update.up, update.down))
    left, right = (down.T.contiguous(), up.T.contiguous()) if place.transposed else (up, down)
    return Multiplication(lambda values, start, stop: (left[start:stop] @ right).mul_(values).add_(values), is_sum=True)


def _block_affine(update: BlockAffine, place: Placement) -> Multiplication:
    """T + T M + M, row of tiles by row of tiles; on transposed storage Tᵀ + Mᵀ Tᵀ + Mᵀ, a column of them by column."""
    blocks, size = _all(update.blocks, place), update.size

    def rows_of_tiles(values: Tensor, start: int, stop: int) -> Tensor:
        result = values.clone()
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            rows, block = slice(low - start, high - start), blocks[number]
            tiles = values[rows].reshape(high - low, -1, size)
            own = block[low - number * size : high - number * size, None]
            result[rows] += (tiles @ block).add_(own).reshape(high - low, -1)
        return result

    def columns_of_tiles(values: Tensor, start: int, stop: int) -> Tensor:
        transposed = blocks.transpose(1, 2)
        tiles = values.reshape(stop - start, -1, size).transpose(0, 1)  # (tiles in a column, size, size)
        return (transposed @ tiles).add_(transposed).add_(tiles).transpose(0, 1).reshape(stop - start, -1)

    return Multiplication(columns_of_tiles, size) if place.transposed else Multiplication(rows_of_tiles)


# How each of these kinds is made ready, by its class.
MULTIPLICATIVE: Mapping[type[Update], Callable[[Any, Placement], Multiplication]] = {
    Scaled: _scaled,
    Rotated: _rotated,
    Multiplied: _multiplied,
    ElementwiseScale: _elementwise_scale,
    BlockAffine: _block_affine,
}


def _vector(vector: LazyTensor | None, place: Placement) -> Tensor | None:
    return None if vector is None else _all(vector, place).flatten()


def _all(tensor: LazyTensor, place: Placement) -> Tensor:
    return finite(tensor.torch().to(place.dtype), place.where)


def _mixed_columns(blocks: Tensor, order: Tensor | None) -> Transform:
    """blocks: (count, size, size), count · size columns."""
    count, size, _ = blocks.shape

    def transform(values: Tensor, start: int, stop: int) -> Tensor:
        taken = values if order is None else values[:, order]
        mixed = taken.reshape(stop - start, count, size).transpose(0, 1) @ blocks
        return _put_back(mixed.transpose(0, 1).reshape(stop - start, count * size), order, axis=1)

    return transform


def _mixed_rows(blocks: Tensor, order: Tensor | None) -> Transform:
    """blocks: (count, size, size), or one for all; with an order all rows come at once, else one block of them."""
    size = blocks.shape[1]

    def transform(values: Tensor, start: int, stop: int) -> Tensor:
        if order is None:
            return blocks[start // size if len(blocks) > 1 else 0] @ values
        taken = values[order].reshape(-1, size, values.shape[1])
        return _put_back((blocks @ taken).reshape(stop - start, values.shape[1]), order, axis=0)

    return transform


def _put_back(values: Tensor, order: Tensor | None, axis: int) -> Tensor:
    return values if order is None else values.index_select(axis, order.argsort())
