"""The same windows in numpy, for machines without the compiled loop.

A library's matrix product proposes float64 sums, in whatever order it adds. Where a bound on its error shows that the
sum of the fixed order rounds to the same number, the proposal is used; the few values that are left are computed in the
fixed order. See docs/decisions/0013-float32-first.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loraformat.arithmetic.chains import chains
from loraformat.arithmetic.factors import Packed
from loraformat.arithmetic.rounding import bits_type, rounded_bits
from loraformat.arithmetic.sums import column_squares, fold, row_squares
from loraformat.arithmetic.tally import TILE, Tally
from loraformat.model.floats import decoded
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_ROUNDOFF = 2.0**-53
_MARGIN = 1.01  # covers the higher orders of the bound, and the rounding of the bound itself
_SMALLEST = 2.0**-1060  # more than what falls below the normal numbers of float64, for any rank
# Of the terms' squares to those of their sums, times rank³: above it a library's sums lack the digits of a tally.
_MOST_CANCELED = 2.0**58
_STRIP = 1 << 16  # values that are worked on at a time
_CHAINS = 1 << 16  # values whose factors are gathered at a time


def product(packed: Packed, start: int, stop: int) -> Floats:
    """Rows of a product in the fixed order, (stop - start, cols) float64."""
    import numpy as np

    found = np.empty((stop - start, packed.cols))
    right = packed.right_matrix()[:, None, :]
    for low, high in _strips(stop - start, packed.cols):
        left = packed.left[start + low : start + high]
        found[low:high] = chains(left.T[:, :, None], right)
    return found


def window(
    packed: Packed, start: int, raw: NDArray[Any], dtype: DType, written: NDArray[Any], out: DType
) -> list[Tally]:
    """See `products.window`; `raw` and `written` are (rows, cols) arrays of the bits of their dtypes."""
    right = packed.right_matrix()
    tallies = []
    for low, high in _tiles(raw.shape[0]):
        tally = Tally()
        for first, last in _strips(high - low, packed.cols):
            rows = slice(low + first, low + last)
            left = packed.left[start + rows.start : start + rows.stop]
            tally += _add(left, right, raw[rows], dtype, written[rows], out)
        tallies.append(tally)
    return tallies


def finish(
    raw: NDArray[Any], dtype: DType, result: Floats, update: Floats, written: NDArray[Any], out: DType
) -> list[Tally]:
    """See `products.finish`; `raw` and `written` are (rows, cols) arrays of the bits of their dtypes."""
    import numpy as np

    tallies = []
    for low, high in _tiles(raw.shape[0]):
        tally = Tally()
        for first, last in _strips(high - low, raw.shape[1]):
            rows = slice(low + first, low + last)
            base = _values(raw[rows], dtype)
            bits = rounded_bits(result[rows], out)
            if dtype is out:
                np.copyto(bits, raw[rows], where=(update[rows] == 0) | np.isnan(base))
            written[rows] = bits
            tally += _tally(base, _values(bits, out), update[rows])
        tallies.append(tally)
    return tallies


def convert(raw: memoryview, dtype: DType, written: memoryview, out: DType) -> bool:
    """See `products.convert`."""
    import numpy as np

    values, into = decoded(raw, dtype), np.frombuffer(written, bits_type(out))
    is_finite = True
    for low in range(0, len(values), _STRIP):
        bits = rounded_bits(values[low : low + _STRIP], out)
        into[low : low + _STRIP] = bits
        is_finite &= bool(np.isfinite(_values(bits, out)).all())
    return is_finite


def _add(left: Floats, right: Floats, raw: NDArray[Any], dtype: DType, written: NDArray[Any], out: DType) -> Tally:
    """Fill `written` with `raw` plus left @ right, rows that belong to one tile."""
    import numpy as np

    base = _values(raw, dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        update = left @ right
        result = base + update
        bound = _Bound(_largest(left, 1), _largest(right, 0), right.shape[0])
        bits, is_open = (_nearest_half if out.itemsize == 2 else _nearest_single)(result, bound.most, out)
        for at in _portions(np.flatnonzero(is_open)):
            rows, cols = np.unravel_index(at, raw.shape)
            exact, found = _decided(left, right, rows, cols, base[rows, cols], result[rows, cols], bound, out)
            if dtype is out:
                np.copyto(found, raw[rows, cols], where=(exact == 0) | np.isnan(base[rows, cols]))
            bits[rows, cols], update[rows, cols] = found, np.where(np.isnan(exact), update[rows, cols], exact)
        terms = float(fold(column_squares(left) * row_squares(right), 0))
        if terms * max(1, right.shape[0]) ** 3 > _MOST_CANCELED * float(fold(row_squares(update), 0)):
            update = chains(left.T[:, :, None], right[:, None, :])
    written[...] = bits
    return _tally(base, _values(bits, out), update)


class _Bound:
    """How far a proposed sum may be from that of the fixed order, but for what rounds off afterwards.

    Both sums differ from the exact one by at most rank · 2^-53 · Σ |l·r|, whatever their order.
    """

    def __init__(self, rows: Floats, cols: Floats, rank: int) -> None:
        self.rows, self.cols = rows * ((2 * rank + 2) * rank * _ROUNDOFF * _MARGIN), cols
        self.most = float(self.rows.max(initial=0.0) * cols.max(initial=0.0)) + _SMALLEST

    def at(self, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> Floats:
        """For single values; zero where the product is exactly zero."""
        return self.rows[rows] * self.cols[cols]


def _nearest_half(result: Floats, most: float, out: DType) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(bits of `result` in a dtype of 16 bits, where they may be others).

    By way of float32, which is enough where the middle between two neighbors is 3 of its numbers away: one for the
    error of the sum, which is less than that in values that are large enough, and half of one for the rounding.
    """
    import numpy as np

    cut, least, largest = (16, 2.0**-100, 3e38) if out is DType.BF16 else (13, 2.0**-14, 65000.0)
    single = result.astype(np.float32)
    bits, half = single.view(np.uint32), 1 << (cut - 1)
    is_near = (bits + np.uint32(half + 2)) & np.uint32(2 * half - 1) <= 4
    size = np.abs(single)
    is_open = is_near | ~((size >= max(least, most * 2.0**25)) & (size < largest))
    if out is DType.BF16:
        return ((bits + np.uint32(half)) >> np.uint32(cut)).astype(np.uint16), is_open
    return single.astype(np.float16).view(np.uint16), is_open


def _nearest_single(result: Floats, most: float, out: DType) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The same in float32; zeros are left open for their sign."""
    import numpy as np

    error = np.abs(result) * (4 * _ROUNDOFF * _MARGIN) + most
    bits = rounded_bits(result + error, out)
    is_open = rounded_bits(result - error, out) != bits
    return bits, is_open | ~np.isfinite(result) | (result == 0)


def _decided(
    left: Floats,
    right: Floats,
    rows: NDArray[np.intp],
    cols: NDArray[np.intp],
    base: Floats,
    result: Floats,
    bound: _Bound,
    out: DType,
) -> tuple[Floats, NDArray[Any]]:
    """(updates, bits) of single values: by the bound of each, and where that does not tell, in the fixed order.

    Updates are zero where they are known to be, and NaN where all that is known is that they make the sum another
    number than the base, or do not matter.
    """
    import numpy as np

    error = bound.at(rows, cols)
    is_zero = error == 0
    is_zero &= (left[rows] == 0).all(axis=1) | (right[:, cols] == 0).all(axis=0)
    error += np.abs(result) * (4 * _ROUNDOFF * _MARGIN) + _SMALLEST
    bits = rounded_bits(result + error, out)
    is_open = rounded_bits(result - error, out) != bits
    is_open |= ~np.isfinite(result)
    is_open &= ~is_zero & ~np.isnan(base)
    exact = np.where(is_zero, 0.0, np.nan)
    exact[is_open] = chains(left[rows[is_open]].T, right[:, cols[is_open]])
    is_sum = is_open | is_zero
    bits[is_sum] = rounded_bits(base[is_sum] + exact[is_sum], out)
    return exact, bits


def _tally(base: Floats, written: Floats, update: Floats) -> Tally:
    """The sums of some rows, each row by itself and then in order, so that strips do not show."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        change = np.where(np.isfinite(base), written - base, 0.0)
        kept, whole = fold(change * update, 1).tolist(), fold(update * update, 1).tolist()
        unchanged = change.size - int(np.count_nonzero(change))
        largest = float(np.abs(update).max(initial=0.0))
    total = Tally(0.0, 0.0, unchanged, change.size, largest)
    for one, other in zip(kept, whole, strict=True):
        total += Tally(one, other)
    return total


def _values(bits: NDArray[Any], dtype: DType) -> Floats:
    import numpy as np

    return decoded(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data, dtype).reshape(bits.shape)


def _largest(values: Floats, axis: int) -> Floats:
    import numpy as np

    found: Floats = np.abs(values).max(axis=axis, initial=0.0)
    return found


def _tiles(rows: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + TILE, rows)) for low in range(0, rows, TILE))


def _strips(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    height = max(1, _STRIP // max(1, cols))
    return ((low, min(low + height, rows)) for low in range(0, rows, height))


def _portions(places: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    return (places[low : low + _CHAINS] for low in range(0, len(places), _CHAINS))


def bits_of(data: memoryview, dtype: DType, rows: int, cols: int) -> NDArray[Any]:
    """A run of bytes as the (rows, cols) unsigned integers of a dtype's size; the same memory."""
    import numpy as np

    if not rows * cols:
        return np.empty((rows, cols), bits_type(dtype))
    return np.frombuffer(data, bits_type(dtype)).reshape(rows, cols)
