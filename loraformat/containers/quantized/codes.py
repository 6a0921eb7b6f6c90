"""What codes mean before their scales: tables of FP4, of float8 and of integers; powers of two."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from loraformat.model.tensors import DType, numbers_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# E2M1 by its code; bit 3 is the sign, and code 8 is -0.
# Source: OCP Microscaling Formats 1.0, table 5.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes as E8M0 means them: 2^(e - 127), and NaN for 255."""
    import numpy as np

    return np.asarray(numbers_of(bytearray(exponents.tobytes()), DType.F8_E8M0).reshape(exponents.shape), np.float32)


def fp4_table() -> NDArray[np.float32]:
    """The 16 values of FP4 by code."""
    import numpy as np

    return np.array(FP4, np.float32)


@cache
def byte_table(dtype: DType) -> NDArray[np.float32]:
    """The 256 values of a dtype of one byte by code: a float8, I8 or U8."""
    import numpy as np

    return np.asarray(numbers_of(bytearray(range(256)), dtype), np.float32)


def integer_table(bits: int, least: int = 0) -> NDArray[np.float32]:
    """The integers from `least` on, one for each code."""
    import numpy as np

    return np.arange(least, least + (1 << bits), dtype=np.float32)
