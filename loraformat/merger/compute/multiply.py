"""Updates that multiply, made ready for blocks of rows: scaling, rotations, reflections, single values. Knows no files.

What mixes the columns of a row needs that row only. What mixes rows needs them together: a whole block of a left
rotation, as it is stored; the window of a merge is a whole number of them (`row_unit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from loraformat.errors import NonFiniteValue
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base_dependent import Recoded, Tiled
from loraformat.model.updates.kinds import Factor, Modulated, Multiplied, Rotated, Scaled, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Turn: TypeAlias = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True, slots=True)
class Multiplication:
    """A term that multiplies: `turn(values, start, stop)` are rows of the weight as stored after it.

    Attributes:
        unit: rows that must stand together: 1, or the size of a block that mixes rows.
        is_sum: whether `turn` is given the base's rows, before other updates, and what it changes in them is added.
    """

    turn: Turn
    unit: int = 1
    is_sum: bool = False


def row_unit(update: Update, transposed: bool, rows: int) -> int:
    """Rows of the stored tensor, out of `rows`, that an update needs together."""
    if isinstance(update, Rotated) and (update.side == "left") != transposed:
        return update.size if update.order is None else rows
    if isinstance(update, Tiled) and transposed:
        return update.size
    return rows if isinstance(update, (Multiplied, Recoded)) and transposed else 1


def prepare_factor(
    update: Factor | Tiled, transposed: bool, shape: tuple[int, int], dtype: torch.dtype, where: str
) -> Multiplication:
    """An update that multiplies. Arguments as for `merger.apply.prepare`."""
    if isinstance(update, Scaled):
        return prepare_scaled(update, transposed, shape[1], dtype, where)
    if isinstance(update, Rotated):
        return prepare_rotated(update, transposed, shape, dtype, where)
    if isinstance(update, Modulated):
        return prepare_modulated(update, transposed, dtype, where)
    if isinstance(update, Tiled):
        return prepare_tiled(update, transposed, dtype, where)
    return prepare_multiplied(update, transposed, shape[0], dtype, where)


def prepare_scaled(update: Scaled, transposed: bool, cols: int, dtype: torch.dtype, where: str) -> Multiplication:
    """Factors of rows and columns. Arguments as for `merger.apply.prepare`."""
    rows, columns = (_vector(vector, dtype, where) for vector in (update.rows, update.cols))
    if transposed:
        rows, columns = columns, rows
    if columns is not None:
        columns = columns.repeat_interleave(cols // len(columns))

    def turn(values: Tensor, start: int, stop: int) -> Tensor:
        if rows is not None:
            values = values * rows[start:stop, None]
        return values if columns is None else values * columns

    return Multiplication(turn, is_sum=update.is_sum)


def prepare_rotated(
    update: Rotated, transposed: bool, shape: tuple[int, int], dtype: torch.dtype, where: str
) -> Multiplication:
    """A block-diagonal factor; transposed storage exchanges left and right: (L W)ᵀ = Wᵀ Lᵀ.

    Args:
        shape: (rows, cols) of the stored tensor, its trailing axes flattened.
        update, transposed, dtype, where: as for `merger.apply.prepare`.
    """
    import torch

    blocks = finite(update.blocks.torch().to(dtype), where)
    if transposed:
        blocks = blocks.transpose(1, 2).contiguous()
    order = None if update.order is None else torch.tensor(update.order)
    unit = row_unit(update, transposed, shape[0])
    if (update.side == "left") != transposed:
        return Multiplication(_mixed_rows(blocks, order), unit)
    return Multiplication(_mixed_columns(blocks.expand(shape[1] // update.size, -1, -1), order))


def prepare_multiplied(
    update: Multiplied, transposed: bool, rows: int, dtype: torch.dtype, where: str
) -> Multiplication:
    """W + (W up) down, row by row; on transposed storage Wᵀ + downᵀ (upᵀ Wᵀ), for which all rows stand together."""
    up, down = (finite(factor.torch().to(dtype), where) for factor in (update.up, update.down))
    if transposed:
        left, right = down.T.contiguous(), up.T.contiguous()
        return Multiplication(lambda values, _start, _stop: values + left @ (right @ values), rows)
    return Multiplication(lambda values, _start, _stop: values + (values @ up) @ down)


def prepare_modulated(update: Modulated, transposed: bool, dtype: torch.dtype, where: str) -> Multiplication:
    """W + W ∘ (up @ down), row by row, in the memory of the product. Arguments as for `merger.apply.prepare`."""
    up, down = (finite(factor.torch().to(dtype), where) for factor in (update.up, update.down))
    left, right = (down.T.contiguous(), up.T.contiguous()) if transposed else (up, down)
    return Multiplication(lambda values, start, stop: (left[start:stop] @ right).mul_(values).add_(values), is_sum=True)


def prepare_tiled(update: Tiled, transposed: bool, dtype: torch.dtype, where: str) -> Multiplication:
    """T + T M + M, row of tiles by row of tiles; on transposed storage Tᵀ + Mᵀ Tᵀ + Mᵀ, a column of them by column."""
    blocks, size = finite(update.blocks.torch().to(dtype), where), update.size

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
        turned = blocks.transpose(1, 2)
        tiles = values.reshape(stop - start, -1, size).transpose(0, 1)  # (tiles in a column, size, size)
        return (turned @ tiles).add_(turned).add_(tiles).transpose(0, 1).reshape(stop - start, -1)

    return Multiplication(columns_of_tiles, size) if transposed else Multiplication(rows_of_tiles)


def common_unit(units: list[int], rows: int) -> int:
    """Rows of a stored tensor that make whole blocks of every unit; at most all."""
    return min(math.lcm(*units), max(rows, 1))


def finite(value: Tensor, where: str) -> Tensor:
    """`value`; raises NonFiniteValue (LF402) where it holds NaN or infinity."""
    if not bool(value.isfinite().all()):
        raise not_finite(where)
    return value


def not_finite(where: str) -> NonFiniteValue:
    """The error about an adapter's value that is NaN or infinite."""
    return NonFiniteValue("the adapter holds NaN or infinity", where=where, hint="the training run diverged")


def _vector(vector: LazyTensor | None, dtype: torch.dtype, where: str) -> Tensor | None:
    return None if vector is None else finite(vector.torch().to(dtype), where).flatten()


def _mixed_columns(blocks: Tensor, order: Tensor | None) -> Turn:
    """blocks: (count, size, size), count · size columns."""
    count, size, _ = blocks.shape

    def turn(values: Tensor, start: int, stop: int) -> Tensor:
        taken = values if order is None else values[:, order]
        turned = taken.reshape(stop - start, count, size).transpose(0, 1) @ blocks
        return _put_back(turned.transpose(0, 1).reshape(stop - start, count * size), order, axis=1)

    return turn


def _mixed_rows(blocks: Tensor, order: Tensor | None) -> Turn:
    """blocks: (count, size, size), or one for all; with an order all rows come at once, else one block of them."""
    size = blocks.shape[1]

    def turn(values: Tensor, start: int, stop: int) -> Tensor:
        if order is None:
            return blocks[start // size if len(blocks) > 1 else 0] @ values
        taken = values[order].reshape(-1, size, values.shape[1])
        return _put_back((blocks @ taken).reshape(stop - start, values.shape[1]), order, axis=0)

    return turn


def _put_back(values: Tensor, order: Tensor | None, axis: int) -> Tensor:
    return values if order is None else values.index_select(axis, order.argsort())
