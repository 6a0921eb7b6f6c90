"""Floating-point numbers as float64 in numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

from loraformat.errors import UnsupportedUpdate
from loraformat.model.tensors import DType, LazyTensor, numbers_of

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]

_EXPONENT = 0x7FF0_0000_0000_0000  # of a float64
# Bits of the significand, the hidden one counted, and the exponent of the smallest normal number.
_PRECISION = {DType.F64: (53, -1022), DType.F32: (24, -126), DType.F16: (11, -14), DType.BF16: (8, -126)}
# Half a unit in the last place, relative: what rounding to the dtype may lose of a normal number (IEEE 754).
ROUNDOFF = {dtype: 2.0**-bits for dtype, (bits, _) in _PRECISION.items()}
# Half of the smallest number above zero: what it may lose of any other.
SMALLEST_LOST = {dtype: 2.0 ** (least - bits) for dtype, (bits, least) in _PRECISION.items()}


_Function = TypeVar("_Function", bound=Callable[..., object])


def quietly(function: _Function) -> _Function:
    """The function, in which numpy warns of no value: what is not finite shows in its result, and others judge that."""

    @wraps(function)
    def quiet(*args: object, **named: object) -> object:
        import numpy as np

        with np.errstate(all="ignore"):
            return function(*args, **named)

    return quiet  # type: ignore[return-value]


def decoded(data: bytearray | memoryview, dtype: DType) -> Floats:
    """The elements of a run of bytes, exactly, as one axis.

    Args:
        dtype: one that `is_floating`.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # a signalling NaN
        return numbers_of(data, dtype).astype(np.float64)


def float64_of(tensor: LazyTensor) -> Floats:
    """All values of a tensor, in its shape.

    Raises: UnsupportedUpdate (LF013): they are complex numbers, whose imaginary parts must not get lost.
    """
    import numpy as np

    if tensor.dtype is DType.C64:
        raise UnsupportedUpdate("a tensor holds complex numbers, which are not supported")
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return tensor.load().astype(np.float64)


def unit_in_last_place(values: Floats, dtype: DType) -> Floats:
    """The distance of two neighbors of `dtype` at the size of each value; that of subnormal ones below all others.

    It is infinite for what is not finite.

    Args:
        dtype: one that `is_floating`.
    """
    import numpy as np

    bits, least = _PRECISION[dtype]
    # Without the bits of its significand a number is the power of two below it.
    powers = (np.maximum(np.abs(values), 2.0**least).view(np.uint64) & _EXPONENT).view(np.float64)
    return np.asarray(powers * 2.0 ** (1 - bits), np.float64)
