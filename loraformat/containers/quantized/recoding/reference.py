"""Checks for `--verify` that the written codes are right, computed only from the merged values.

Nothing here is shared with the encoders but the layout of the tensors. A scale must be the one that the largest value
of its block asks for, and a value must lie as near to the number that its code means as to any other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.containers.quantized.bitsandbytes import Blocks, reference_scales
from loraformat.containers.quantized.block_fp8 import Block
from loraformat.containers.quantized.parts import matrix_of
from loraformat.containers.quantized.scheme import SCHEMES
from loraformat.model.checkpoint import Checkpoint, Quantized, QuantizedWeight
from loraformat.model.floats import decoded
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_SLACK = 2.0**-18  # of roundings to float32 on the way
_HALF = 2.0**-11  # of one to float16
# How much larger than asked for a scale may be that is rounded up to a dtype.
_ROUNDED_UP = {DType.F32: _SLACK, DType.BF16: 2.0**-7, DType.F16: 2.0**-10, DType.F8_E8M0: 1.0, DType.U8: 1.0}
_LEAST = {DType.F16: 2.0**-24}  # the step of small scales


def parts_of(weight: QuantizedWeight) -> frozenset[str]:
    """The tensors that are other ones when a weight is put into codes again; its others stay as they are."""
    is_nested = isinstance(weight.layout, Blocks) and weight.layout.nested
    return frozenset((*weight.parts[:2], weight.parts[2], weight.parts[-1]) if is_nested else weight.parts[:2])


def rows_together(weight: QuantizedWeight) -> int:
    """Rows, as a matrix of the last axis, that share scales: they can only be compared together."""
    height, width = matrix_of(weight.shape)
    if isinstance(weight.layout, Blocks):
        return min(height, weight.layout.size // math.gcd(weight.layout.size, width))
    if isinstance(weight.layout, Block):
        is_cut = len(weight.shape) > 2 and weight.shape[-2] % weight.layout.rows
        return weight.shape[-2] if is_cut else min(height, weight.layout.rows)
    return 1


def decoded_rows(written: Quantized, name: str, start: int, count: int) -> Floats:
    """(count, columns): what codes mean, rows as of a matrix of the last axis."""
    return SCHEMES[written.scheme].reference(written.stored, written.weights[name], start, start + count)


def strayed(
    written: Quantized, name: str, exact: Floats, start: int, slack: Floats | float = 0.0
) -> tuple[int, int, float] | None:
    """The first value that its code does not mean: (row, column, what the code means); None where all are right.

    Args:
        written: the output, read as a base.
        exact: (k, columns) in float64, what rows from `start` on must be, whole blocks of them.
        slack: how far each of them may be off, since it hangs on a rounding.
    """
    import numpy as np

    slack = np.broadcast_to(np.asarray(slack, np.float64), exact.shape)
    weight, found = written.weights[name], decoded_rows(written, name, start, len(exact))
    if isinstance(weight.layout, Blocks):
        room = _of_four_bits(written.stored, weight, exact, start, slack)
    elif isinstance(weight.layout, Block):
        room = _of_float8(written.stored, weight, exact, start, slack)
    else:
        room = _of_eight_bits(written.stored, weight, exact, start, slack)
    bad = np.argwhere(~(np.abs(found - exact) <= room))
    if not len(bad):
        return None
    row, column = (int(number) for number in bad[0])
    return start + row, column, float(found[row, column])


def _of_four_bits(stored: Checkpoint, weight: QuantizedWeight, exact: Floats, start: int, slack: Floats) -> Floats:
    """How far each value may be from the number that its code means; negative where the scale of its block is wrong."""
    import numpy as np

    assert isinstance(weight.layout, Blocks)
    size, flat = weight.layout.size, exact.reshape(-1)
    first = start * exact.shape[1] // size
    own = np.maximum.reduceat(np.abs(flat), np.arange(0, len(flat), size))
    doubt = np.maximum.reduceat(slack.reshape(-1), np.arange(0, len(flat), size))
    scale, outer = reference_scales(stored, weight, np.arange(first, first + len(own)))
    is_right = np.abs(scale - own) <= _SLACK * (own + np.abs(scale)) + _widest_step(stored, weight) * outer + doubt
    block = np.arange(len(flat)) // size
    book = np.frombuffer(stored.weights[weight.parts[-2]].raw(0, 16), "<f4").astype(np.float64)
    nearest = np.full(len(flat), np.inf)
    for number in book:
        nearest = np.minimum(nearest, np.abs(number * own[block] - flat))
    room = nearest + (np.abs(scale - own) + doubt)[block] + _SLACK * own[block] + slack.reshape(-1)
    return np.where(is_right[block], room, -1.0).reshape(exact.shape)


def _widest_step(stored: Checkpoint, weight: QuantizedWeight) -> float:
    """How far a number in [-1, 1] may be from the nearest of the table that quantizes scales; 0 where there is none."""
    import numpy as np

    assert isinstance(weight.layout, Blocks)
    if not weight.layout.nested:
        return 0.0
    table = np.frombuffer(stored.weights[weight.parts[3]].raw(0, 256), "<f4").astype(np.float64)
    return float(max(np.diff(table).max() / 2, 1 + table[0], 1 - table[-1])) * (1 + _SLACK)


def _of_eight_bits(stored: Checkpoint, weight: QuantizedWeight, exact: Floats, start: int, slack: Floats) -> Floats:
    import numpy as np

    data = stored.weights[weight.parts[1]].raw(start, start + len(exact))
    scale = decoded(data, DType.F32)[:, None]
    own = np.abs(exact).max(axis=1, initial=0)[:, None]
    doubt = slack.max(axis=1, initial=0)[:, None]
    is_right = np.abs(scale - own) <= 2 * _HALF * own + 2.0**-24 + doubt
    room = own / 254 * (1 + 4 * _HALF) + 2 * _HALF * np.abs(exact) + np.abs(scale - own) + 2.0**-24 + slack
    return np.where(is_right, room, -1.0)


def _of_float8(stored: Checkpoint, weight: QuantizedWeight, exact: Floats, start: int, slack: Floats) -> Floats:
    import numpy as np

    block, height = weight.layout, weight.shape[-2]
    assert isinstance(block, Block)
    dtype, grid_dtype = (stored.tensors[part].dtype for part in weight.parts[:2])
    rows, cols = np.arange(start, start + len(exact)), np.arange(exact.shape[1])
    line = rows // height * -(-height // block.rows) + rows % height // block.rows
    most = np.zeros((int(line[-1]) + 1 - int(line[0]), -(-exact.shape[1] // block.cols)))
    place = (line - line[0])[:, None], (cols // block.cols)[None]
    np.maximum.at(most, place, np.abs(exact))
    doubt = np.zeros_like(most)
    np.maximum.at(doubt, place, slack)
    largest = 448.0 if dtype is DType.F8_E4M3 else 57344.0
    wanted = np.where(most == 0, 1.0, most / largest)
    scale = _grid(stored, weight.parts[1], grid_dtype)[int(line[0]) : int(line[-1]) + 1]
    above = wanted * (1 + _ROUNDED_UP[grid_dtype]) + _LEAST.get(grid_dtype, 0.0) + 2.0**-127
    # Where a doubtful value may be the largest of its block, the scale follows it.
    is_right = (doubt > 0) | (scale >= wanted * (1 - _SLACK)) & (scale <= above)
    each = scale[place]
    digits, least = (3, -6) if dtype is DType.F8_E4M3 else (2, -14)
    exponent = np.maximum(np.frexp(exact / each)[1] - 1, least)
    room = 0.5 * np.ldexp(each, exponent - digits) + _SLACK * np.abs(exact) + slack
    return np.where(is_right[place], room, -1.0)


def _grid(stored: Checkpoint, name: str, dtype: DType) -> NDArray[np.float64]:
    weight = stored.weights[name]
    kind = DType.F8_E8M0 if dtype is DType.U8 else dtype
    return decoded(weight.raw(0, weight.rows), kind).reshape(matrix_of(weight.shape))
