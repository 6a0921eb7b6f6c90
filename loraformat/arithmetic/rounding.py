"""float64 to the bits of narrower dtypes: rounded once, to the nearest, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

# Bits of the significand, the hidden one counted; exponent of the smallest normal number; bits of a NaN.
_PRECISION = {DType.F16: (11, -14), DType.BF16: (8, -126)}
_NAN = {DType.F64: 0x7FF8 << 48, DType.F32: 0x7FC0_0000, DType.F16: 0x7E00, DType.BF16: 0x7FC0}
_EXPONENT = 0x7FF0_0000_0000_0000
_MOST = 2.0**200  # larger than every number of 16 bits; its unit does not overflow


def bits_type(dtype: DType) -> type[np.unsignedinteger[Any]]:
    """The unsigned integers of the size of a dtype.

    >>> bits_type(DType.BF16).__name__
    'uint16'
    """
    import numpy as np

    return {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]


def rounded_bits(values: Floats, dtype: DType) -> NDArray[Any]:
    """The bits of each value in `dtype`, as unsigned integers; every NaN has the same.

    >>> import numpy as np
    >>> [hex(bits) for bits in rounded_bits(np.array([1.0, 1 + 2**-8 + 2**-40]), DType.BF16)]
    ['0x3f80', '0x3f81']

    Args:
        dtype: one that `is_floating`.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype in _PRECISION:
            values = _on_grid(values, *_PRECISION[dtype])
        if dtype is DType.F64:
            bits: NDArray[Any] = np.array(values).view(np.uint64)
        elif dtype is DType.F16:
            bits = values.astype(np.float16).view(np.uint16)
        else:
            bits = values.astype(np.float32).view(np.uint32)
            bits = (bits >> 16).astype(np.uint16) if dtype is DType.BF16 else bits
    bits[np.isnan(values)] = _NAN[dtype]
    return bits


def _on_grid(values: Floats, precision: int, least: int) -> Floats:
    """Values rounded to multiples of the unit in their last place, still as float64.

    A number of 1.5 · 2^52 units added and taken away again leaves no digits below the unit. Numbers too large for the
    dtype come out too large for it, and overflow when they are converted, which is exact for all others.
    """
    import numpy as np

    power = (np.ascontiguousarray(values).view(np.uint64) & np.uint64(_EXPONENT)).view(np.float64)
    large = np.clip(power, 2.0**least, _MOST) * (1.5 * 2.0 ** (53 - precision))
    rounded: Floats = values + large
    rounded -= large
    return np.copysign(rounded, values)
