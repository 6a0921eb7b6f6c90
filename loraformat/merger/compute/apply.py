"""The arithmetic of a merge, on blocks of rows of one stored tensor. Knows no files.

Products and norms come from `loraformat.arithmetic`, whose results do not depend on how many rows are asked for. All
else is done value by value. Neither the height of a block nor the number of threads shows in a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraformat.arithmetic import TILE, column_squares, row_squares
from loraformat.merger.compute.kinds.steps import Addition, Multiplication, Overwrite, Step

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# A few matrices of so many bytes are worked on at a time; larger ones leave the cache of a processor.
_MOST_STRIP_NBYTES = 1 << 19
_LEAST_STRIP = 8


def apply(window: Floats, start: int, steps: Sequence[Step], column_norms: Sequence[Floats | None]) -> Floats:
    """A block of whole rows with all terms applied, strip by strip.

    Args:
        window: (k, cols), rows from `start` on, a multiple of TILE and of the steps' units. Changed in place.
        steps: in order. Norms of DoRA are those of the weight that its adapter was trained on: the base's, with what
            overwrites it, before other updates are added; so are the values that an update changes as a sum.
        column_norms: for each step that needs them (1, cols), else None.
    Returns: `window`, not rounded yet.
    """
    import numpy as np

    stop, height = start + window.shape[0], strip_of(window.shape[1], start + window.shape[0], steps)
    with np.errstate(all="ignore"):  # a value that is not finite is reported with its place when it is written
        for low, high in blocks_of(start, stop, height):
            _apply(window[low - start : high - start], low, steps, column_norms)
    return window


def _apply(strip: Floats, low: int, steps: Sequence[Step], column_norms: Sequence[Floats | None]) -> None:
    high = low + strip.shape[0]
    for step in steps:
        if isinstance(step, Overwrite):
            _overwrite(strip, step, low, high)
    origin = strip.copy() if any(_needs_origin(step) for step in steps) and len(steps) > 1 else strip
    for step, norms in zip(steps, column_norms, strict=True):
        if isinstance(step, Multiplication) and step.is_sum:
            strip += step.transform(origin, low, high) - origin
        elif isinstance(step, Multiplication):
            strip[:] = step.transform(strip, low, high)
        elif isinstance(step, Addition):
            _add_where(strip, origin, step, norms, low, high)


def _add_where(strip: Floats, origin: Floats, step: Addition, norms: Floats | None, low: int, high: int) -> None:
    """`_add` on the rows of the strip that the step adds to."""
    if step.span is None:
        _add(strip, origin, step, norms, low, high)
        return
    first, start, stop = step.span[0], max(low, step.span[0]), min(high, step.span[1])
    if start < stop:
        rows = strip[start - low : stop - low]
        before = rows if origin is strip else origin[start - low : stop - low]
        _add(rows, before, step, norms, start - first, stop - first)


def add_column_squares(total: Floats, window: Floats, start: int, steps: Sequence[Step], wanted: Addition) -> None:
    """Add Σ over rows of (W + ΔW)² for one DoRA step to `total`, tile by tile, so that windows do not show.

    Args:
        total: (1, cols).
        window, start, steps: as for `apply`; `window` is changed.
        wanted: the step whose norms these are.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        for low, high in blocks_of(start, start + window.shape[0], TILE):
            tile = window[low - start : high - start]
            for step in steps:
                if isinstance(step, Overwrite):
                    _overwrite(tile, step, low, high)
            total += column_squares(tile + wanted.delta(low, high))


def blocks_of(start: int, stop: int, height: int) -> Iterator[tuple[int, int]]:
    """(low, high) of the blocks of `height` rows from `start` to `stop`; the last may be lower."""
    for low in range(start, stop, height):
        yield low, min(low + height, stop)


def common_unit(units: list[int], rows: int) -> int:
    """Rows of a stored tensor that make whole blocks of every unit; at most all."""
    return min(math.lcm(*units), max(rows, 1))


def strip_of(cols: int, rows: int, steps: Sequence[Step] = ()) -> int:
    """Rows that are computed at a time: a part of TILE that stays in the cache, and whole units of all steps."""
    height = TILE
    while height > _LEAST_STRIP and height * cols * 8 > _MOST_STRIP_NBYTES:
        height //= 2
    return common_unit([height, *(step.unit for step in steps if isinstance(step, Multiplication))], rows)


def _needs_origin(step: Step) -> bool:
    return step.is_sum if isinstance(step, Multiplication) else isinstance(step, Addition) and step.is_dora


def _overwrite(strip: Floats, step: Overwrite, low: int, high: int) -> None:
    numbers, values = step.rows(low, high)
    strip[numbers] = values


def _add(strip: Floats, origin: Floats, step: Addition, norms: Floats | None, low: int, high: int) -> None:
    """`strip += Δ`, or for DoRA `strip = f · (strip + Δ)` with f = m / ‖W + Δ‖ (peft 0.21.2, tuners/lora/dora.py)."""
    import numpy as np

    delta = step.delta(low, high)
    if step.magnitude is not None and norms is None and origin is not strip:
        norms = np.sqrt(row_squares(origin + delta))[:, None]
    strip += delta
    if step.magnitude is None:
        return
    if norms is None:
        norms = np.sqrt(row_squares(strip))[:, None]
    strip *= (step.magnitude[low:high] if step.is_per_row else step.magnitude) / norms
