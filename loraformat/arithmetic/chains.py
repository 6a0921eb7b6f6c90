"""Chains of fused multiply-adds, bit for bit, without an instruction for them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# Between these no product, and no error of one, leaves the normal numbers of float64.
_LEAST, _MOST = 2.0**-400, 2.0**400
_SPLITTER = 2.0**27 + 1


def chains(left: Floats, right: Floats) -> Floats:
    """Σ over the first axis of left · right, each term added by one fused multiply-add, beginning with 0.

    >>> import numpy as np
    >>> chains(np.array([[3.0], [1.0]]), np.array([[0.5], [2.0**-60]]))
    array([1.5])

    Args:
        left, right: float64, (rank, ...) of shapes that broadcast.
    """
    import numpy as np

    shape = np.broadcast_shapes(left.shape[1:], right.shape[1:])
    total = np.zeros(shape)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if _is_single(left) and _is_single(right):
            for one, other in zip(left, right, strict=True):
                total += one * other  # 48 bits at most: the product is exact
        elif _is_moderate(left) and _is_moderate(right):
            for one, other in zip(left, right, strict=True):
                total = _fused(one, other, total)
        else:
            for one, other in zip(left, right, strict=True):
                total = np.asarray(np.frompyfunc(_fused_scalar, 3, 1)(one, other, total), np.float64).reshape(shape)
    return total


def _is_single(values: Floats) -> bool:
    """Whether all values are numbers of float32."""
    import numpy as np

    return bool((values.astype(np.float32) == values).all()) and bool(np.isfinite(values).all())


def _is_moderate(values: Floats) -> bool:
    import numpy as np

    sizes = np.abs(values)
    return bool(((sizes == 0) | ((sizes >= _LEAST) & (sizes <= _MOST))).all())


def _fused(one: Floats, other: Floats, total: Floats) -> Floats:
    """`one` · `other` + `total`, rounded once.

    The exact sum is that of three numbers. The two smaller ones are added with rounding to odd, which a second
    rounding to the nearest cannot spoil (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    import numpy as np

    high, low = _product(one, other)
    part, rest = _sum(total, low)
    whole, error = _sum(high, part)
    small, lost = _sum(rest, error)
    bits = small.view(np.int64)
    away = np.where((small > 0) == (lost > 0), 1, -1)
    bits += away * ((lost != 0) & (bits & 1 == 0))
    return whole + small


def _product(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The product of two numbers and its error (Dekker 1971)."""
    product = one * other
    a, b = _halves(one)
    c, d = _halves(other)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _halves(value: Floats) -> tuple[Floats, Floats]:
    """Two numbers of at most 26 bits whose sum is the value (Veltkamp)."""
    large = value * _SPLITTER
    high = large - (large - value)
    return high, value - high


def _sum(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The sum of two numbers and its error (Knuth)."""
    total = one + other
    back = total - one
    return total, (one - (total - back)) + (other - back)


def _fused_scalar(one: float, other: float, total: float) -> float:
    """The same for any three numbers, by rationals."""
    one, other, total = float(one), float(other), float(total)
    if not (math.isfinite(one) and math.isfinite(other) and math.isfinite(total)):
        return one * other + total
    product = Fraction(one) * Fraction(other)
    exact = product + Fraction(total)
    if not exact:  # it is negative only where both terms are negative zeros
        both = not product and math.copysign(1, one) * math.copysign(1, other) < 0 and math.copysign(1, total) < 0
        return -0.0 if both else 0.0
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
