"""The arithmetic of a merge, on blocks of rows of one stored tensor. Knows no files.

A block is computed in tiles of `TILE` rows counted from row 0 of the tensor. Matrix products of other heights may take
another code path and differ in the last bit, so neither the window nor the number of threads shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraformat import arithmetic
from loraformat.merger.compute.kinds.steps import Addition, Multiplication, Overwrite, Step

if TYPE_CHECKING:
    from torch import Tensor

TILE = arithmetic.TILE


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
            tile += step.transform(base, low, high).sub_(base)
        elif isinstance(step, Multiplication):
            tile.copy_(step.transform(tile, low, high))
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


def common_unit(units: list[int], rows: int) -> int:
    """Rows of a stored tensor that make whole blocks of every unit; at most all."""
    return min(math.lcm(*units), max(rows, 1))


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
