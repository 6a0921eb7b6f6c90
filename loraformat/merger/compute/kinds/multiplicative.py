"""Updates that multiply, made ready for blocks of rows: scaling, rotations, reflections, single values. Knows no files.

What mixes the columns of a row needs that row only. What mixes rows needs them together: a whole block of a left
rotation, as it is stored; the window of a merge is a whole number of them (`Kind.row_unit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.arithmetic import multiply
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Multiplication, Transform, finite, product_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import BlockAffine, ElementwiseScale, Multiplied, Rotated, Scaled, Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats


def _scaled(update: Scaled, place: Placement) -> Multiplication:
    """Factors of rows and columns."""
    rows, columns = (_vector(vector, place) for vector in (update.rows, update.cols))
    if place.transposed:
        rows, columns = columns, rows
    if columns is not None:
        columns = columns.repeat(place.shape[1] // len(columns))

    def transform(values: Floats, start: int, stop: int) -> Floats:
        if rows is not None:
            values = values * rows[start:stop, None]
        return values if columns is None else values * columns

    return Multiplication(transform, is_sum=update.is_sum)


def _rotated(update: Rotated, place: Placement) -> Multiplication:
    """A block-diagonal factor; transposed storage exchanges left and right: (L W)ᵀ = Wᵀ Lᵀ."""
    import numpy as np

    blocks = _all(update.blocks, place)
    if place.transposed:
        blocks = np.ascontiguousarray(blocks.swapaxes(1, 2))
    order = None if update.order is None else np.asarray(update.order, np.int64)
    if (update.side == "left") != place.transposed:
        return Multiplication(_mixed_rows(blocks, order), update.row_unit(place.transposed, place.shape[0]))
    return Multiplication(_mixed_columns(blocks, order))


def _multiplied(update: Multiplied, place: Placement) -> Multiplication:
    """W + (W up) down, row by row; on transposed storage Wᵀ + downᵀ (upᵀ Wᵀ), for which all rows stand together."""
    up, down = (_all(factor, place) for factor in (update.up, update.down))
    if place.transposed:
        left, right = down.T, up.T
        return Multiplication(lambda values, _start, _stop: values + multiply(left, multiply(right, values)), len(left))
    return Multiplication(lambda values, _start, _stop: values + multiply(multiply(values, up), down))


def _elementwise_scale(update: ElementwiseScale, place: Placement) -> Multiplication:
    """W + W ∘ (up @ down), row by row, in the memory of the product."""
    up, down = (_all(factor, place) for factor in (update.up, update.down))
    product = product_of(down.T, up.T) if place.transposed else product_of(up, down)

    def transform(values: Floats, start: int, stop: int) -> Floats:
        result = product(start, stop)
        result *= values
        result += values
        return result

    return Multiplication(transform, is_sum=True)


def _block_affine(update: BlockAffine, place: Placement) -> Multiplication:
    """T + T M + M, row of tiles by row of tiles; on transposed storage Tᵀ + Mᵀ Tᵀ + Mᵀ, a column of them by column."""
    import numpy as np

    blocks, size = _all(update.blocks, place), update.size

    def rows_of_tiles(values: Floats, start: int, stop: int) -> Floats:
        result: Floats = values.copy()
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            rows, block = slice(low - start, high - start), blocks[number]
            mixed = multiply(values[rows].reshape(-1, size), block).reshape(high - low, -1, size)
            mixed += block[low - number * size : high - number * size, None]
            result[rows] += mixed.reshape(high - low, -1)
        return result

    def columns_of_tiles(values: Floats, start: int, stop: int) -> Floats:
        transposed, result = blocks.swapaxes(1, 2), np.empty_like(values)
        for low in range(0, stop - start, size):
            tiles = values[low : low + size].reshape(size, -1, size).swapaxes(0, 1)  # (tiles in a column, size, size)
            mixed = multiply(transposed, tiles) + transposed + tiles
            result[low : low + size] = mixed.swapaxes(0, 1).reshape(size, -1)
        return result

    return Multiplication(columns_of_tiles, size) if place.transposed else Multiplication(rows_of_tiles)


# How each of these kinds is made ready, by its class.
MULTIPLICATIVE: Mapping[type[Update], Callable[[Any, Placement], Multiplication]] = {
    Scaled: _scaled,
    Rotated: _rotated,
    Multiplied: _multiplied,
    ElementwiseScale: _elementwise_scale,
    BlockAffine: _block_affine,
}


def _vector(vector: LazyTensor | None, place: Placement) -> Floats | None:
    return None if vector is None else _all(vector, place).reshape(-1)


def _all(tensor: LazyTensor, place: Placement) -> Floats:
    return finite(tensor.load(), place.where)


def _mixed_columns(blocks: Floats, order: NDArray[np.int64] | None) -> Transform:
    """blocks: (count, size, size), or one for all; count · size columns."""
    size = blocks.shape[1]

    def transform(values: Floats, start: int, stop: int) -> Floats:
        taken = values if order is None else values[:, order]
        if len(blocks) == 1:
            mixed = multiply(taken.reshape(-1, size), blocks[0])
        else:
            mixed = multiply(taken.reshape(stop - start, -1, size).swapaxes(0, 1), blocks).swapaxes(0, 1)
        return _put_back(mixed.reshape(values.shape), order, axis=1)

    return transform


def _mixed_rows(blocks: Floats, order: NDArray[np.int64] | None) -> Transform:
    """blocks: (count, size, size), or one for all; with an order all rows come at once, else whole blocks of them."""
    size = blocks.shape[1]

    def transform(values: Floats, start: int, stop: int) -> Floats:
        taken = values if order is None else values[order]
        numbers = range(start // size, stop // size) if len(blocks) > 1 else [0] * ((stop - start) // size)
        mixed = multiply(blocks[list(numbers)], taken.reshape(-1, size, values.shape[1]))
        return _put_back(mixed.reshape(values.shape), order, axis=0)

    return transform


def _put_back(values: Floats, order: NDArray[np.int64] | None, axis: int) -> Floats:
    return values if order is None else values.take(order.argsort(), axis)
