"""Codes decoded to float64 from their bit fields, for `--verify`: shares nothing with the decoders of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats


def single(values: NDArray[Any]) -> Floats:
    """Values rounded to float32."""
    import numpy as np

    return np.asarray(values.astype(np.float32), np.float64)


def eight_bits(code: NDArray[np.int64], digits: int = 3) -> Floats:
    """Float8 by sign, exponent and digits: E4M3 without infinities, or E5M2 with 2 digits.

    Source: OCP 8-bit Floating Point Specification 1.0, table 1.
    """
    import numpy as np

    steps, exponents = 2**digits, 2 ** (7 - digits)
    bias = exponents // 2 - 1
    digit, exponent = code % steps, code // steps % exponents
    size = np.where(exponent == 0, digit * 2.0 ** (1 - bias - digits), (1 + digit / steps) * 2.0 ** (exponent - bias))
    if digits == 3:
        size = np.where(code % 128 == 127, np.nan, size)
    else:
        size = np.where(exponent == exponents - 1, np.where(digit == 0, np.inf, np.nan), size)
    return np.asarray(np.where(code >= 128, -size, size), np.float64)


def four_bits(code: NDArray[np.int64]) -> Floats:
    """E2M1 by sign, exponent and digit. Source: OCP Microscaling Formats 1.0, table 5."""
    import numpy as np

    exponent, digit = code // 2 % 4, code % 2
    size = np.where(exponent == 0, digit * 0.5, (1 + digit * 0.5) * 2.0 ** (exponent - 1))
    return np.asarray(np.where(code >= 8, -size, size), np.float64)
