"""Exponentials, cosines and sines by additions and multiplications alone: the same bytes on every machine.

numpy takes these functions from vector libraries that differ between processors. Here each is a polynomial after a
reduction of the argument, computed elementwise in float64, within two units in the last place.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraformat.model.floats import Floats

# ln 2 and π/2 as sums of float64 whose products with the integers that occur are exact, but for the last of each.
_LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))
_QUARTER = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
# Coefficients of the Taylor series, as many as float64 needs: of exp to ln 2 / 2, of cos and sin to π/4.
_EXP = [1 / math.factorial(power) for power in range(15)]
_COS = [(-1) ** half / math.factorial(2 * half) for half in range(10)]
_SIN = [(-1) ** half / math.factorial(2 * half + 1) for half in range(10)]
# Beyond it exp is 0 or infinite.
_MOST = 800.0
# The reduction is exact for as many quarter turns; farther out integers make it.
_MOST_QUARTERS = 2**20
_PI_BITS = 1400  # more than the largest float64 has, and those of the remainder


def exp(values: Floats) -> Floats:
    """The exponential function of each value.

    >>> import numpy as np
    >>> exp(np.array([0.0, 1.0, -np.inf]))
    array([1.        , 2.71828183, 0.        ])
    """
    import numpy as np

    bounded = np.clip(values, -_MOST, _MOST)
    steps = np.rint(np.where(np.isnan(bounded), 0.0, bounded) * (1 / math.log(2)))
    rest = (bounded - steps * _LN2[0]) - steps * _LN2[1]
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.ldexp(_polynomial(_EXP, rest), steps.astype(np.int32)))


def cos_and_sin(angles: Floats) -> tuple[Floats, Floats]:
    """(cos, sin) of angles in radians; NaN for what is not finite.

    >>> import numpy as np
    >>> cos_and_sin(np.array([0.0, 1.0]))
    (array([1.        , 0.54030231]), array([0.        , 0.84147098]))
    """
    import numpy as np

    finite = np.where(np.isfinite(angles), angles, 0.0)
    quarters = np.rint(finite * (2 / math.pi))
    is_far = np.abs(quarters) > _MOST_QUARTERS
    quarters = np.where(is_far, 0.0, quarters)
    rest = np.where(is_far, 0.0, finite)
    for part in _QUARTER:
        rest = rest - quarters * part
    if is_far.any():
        reduced = [_reduced(angle) for angle in finite[is_far].tolist()]
        quarters[is_far], rest[is_far] = np.array(reduced).T
    square = rest * rest
    cos, sin = _polynomial(_COS, square), _polynomial(_SIN, square) * rest
    turn = quarters.astype(np.int64) % 4
    both = (np.asarray(np.choose(turn, (cos, -sin, -cos, sin))), np.asarray(np.choose(turn, (sin, cos, -sin, -cos))))
    for values in both:
        values[~np.isfinite(angles)] = np.nan
    return both


def _reduced(angle: float) -> tuple[int, float]:
    """(quarter turns mod 4, what is left of a large angle), by integers."""
    digits, unit = angle.as_integer_ratio()
    scaled, pi = (digits << _PI_BITS + 1) // unit, _pi()
    quarters = (2 * scaled + pi) // (2 * pi)
    return quarters % 4, float(Fraction(scaled - quarters * pi, 1 << _PI_BITS + 1))


@cache
def _pi() -> int:
    """π in units of 2^-_PI_BITS, by Machin's formula: 16·arctan(1/5) - 4·arctan(1/239)."""
    guard = 32
    total = 0
    for factor, base in ((16, 5), (-4, 239)):
        term, odd = (factor << _PI_BITS + guard) // base, 1
        while term:
            total += term // odd
            term, odd = -term // (base * base), odd + 2
            term = 0 if term == -1 else term
    return total >> guard


def _polynomial(coefficients: Sequence[float], values: Floats) -> Floats:
    """Σ coefficients[n] · valuesⁿ by Horner's rule."""
    total = values * 0.0 + coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * values + coefficient
    return total
