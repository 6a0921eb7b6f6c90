"""Stochastic rounding from float64 to the output's dtype, reproducible by a seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from loraformat.merger.compute.buffers import Block
from loraformat.model.floats import unit_in_last_place
from loraformat.model.tensors import DType, bytes_of, numbers_of, rounded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values

    Bits = NDArray[np.unsignedinteger[Any]]

_LARGEST = {DType.BF16: 255 * 2.0**120, DType.F16: 2047 * 2.0**5}
_PER_BLOCK = 16  # 16-bit numbers in one block of Philox4x64


def nearest_bits(values: Floats, dtype: DType) -> Bits:
    """Values rounded once to the nearest of `dtype`, as unsigned integers of its size."""
    return _bits_of(rounded(values, dtype), dtype)


def _bits_of(values: Values, dtype: DType) -> Bits:
    """The same for an array of `dtype.numpy`, of values that `dtype` can hold."""
    import numpy as np

    return np.frombuffer(bytes_of(values, dtype), f"<u{dtype.itemsize}").reshape(values.shape)


def values_of(bits: Bits, dtype: DType) -> Floats:
    """The numbers that bits of a dtype mean."""
    import numpy as np

    data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return numbers_of(data, dtype).astype(np.float64).reshape(bits.shape)


def keep_unchanged(raw: Block, written: Block, base: Floats, update: Floats) -> None:
    """Put the base's very bits where nothing is added to them, or where they are not a number.

    -0, and what a NaN carries, would not come through an addition.

    Args:
        raw, written: as stored and as written; nothing is done where their dtypes differ.
        base, update: the values of `raw`, and what is added to them.
    """
    import numpy as np

    if raw.dtype is written.dtype:
        np.copyto(written.bits, raw.bits, where=(update == 0) | np.isnan(base))


class Chance:
    """Rounds up with the probability with which a value is nearer to the upper neighbor: errors cancel on average.

    The number drawn for an element depends on the seed, the tensor's name and the element's place in it alone.
    """

    def __init__(self, seed: int, tensor: str) -> None:
        digest = hashlib.sha256(f"{seed}\n{tensor}".encode()).digest()
        self._key = int.from_bytes(digest[:16], "little")

    def bits(self, values: Floats, dtype: DType, first: int) -> Bits:
        """Values rounded to one of their neighbors in `dtype`, as unsigned integers of its size.

        Outputs wider than 16 bits are rounded to the nearest.

        Args:
            first: the place of the first value in the tensor, row-major.
        """
        import numpy as np

        if dtype.itemsize != 2:
            return nearest_bits(values, dtype)
        size = np.abs(values)
        with np.errstate(all="ignore"):
            unit = unit_in_last_place(values, dtype)
            steps = size / unit
            below = np.floor(steps)
            steps -= below  # which part of the way to the upper neighbor, exactly
            below += self._uniform(first, values.size).reshape(values.shape) < steps
            below *= unit
        drawn = np.copysign(below, values, out=below)
        is_inside = size <= _LARGEST[dtype]
        if is_inside.all():
            return _bits_of(drawn.astype(dtype.numpy), dtype)
        # What is beyond the largest number, infinite or no number has no two neighbors.
        return nearest_bits(np.where(is_inside, drawn, values), dtype)

    def _uniform(self, first: int, count: int) -> Floats:
        """`count` numbers from number `first` on, in [0, 1) with 16 bits: Philox4x64-10 in counter mode."""
        import numpy as np

        start, skip = divmod(first, _PER_BLOCK)
        blocks = -(-(skip + count) // _PER_BLOCK)
        drawn = np.random.Philox(key=self._key, counter=start).random_raw(blocks * 4)
        halves = drawn.astype("<u8", copy=False).view("<u2")[skip : skip + count]
        return halves * 2.0**-16
