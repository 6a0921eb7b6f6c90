"""Elementary functions against Python's decimals and the C library, and for the same bits wherever a value stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import mpmath
import numpy as np
import pytest

from loraformat.arithmetic.functions.elementary import cos_and_sin, exp

RANDOM = np.random.default_rng(0)
POWERS = np.concatenate([RANDOM.uniform(-700, 700, 500), RANDOM.normal(size=500), [0.0, -0.0, 1e-300, -708.0, 709.0]])
ANGLES = np.concatenate(
    [
        *(RANDOM.uniform(-most, most, 500) for most in (1e-6, 1.0, 10.0, 1e6)),
        np.arange(-400, 400) * (math.pi / 4),
        [0.0, 1e-300, 5e-324, 1e7, -1e300],
    ]
)


def test_exp_is_within_two_units_of_the_true_value() -> None:
    with localcontext() as context:
        context.prec = 40
        for power, found in zip(POWERS.tolist(), exp(POWERS).tolist(), strict=True):
            true = Decimal(power).exp()
            assert abs(Decimal(found) - true) <= 2 * Decimal(math.ulp(float(true)))


@pytest.mark.parametrize(("part", "function"), [(0, math.cos), (1, math.sin)])
def test_cos_and_sin_are_within_three_units_of_the_c_library(part: int, function: Callable[[float], float]) -> None:
    # two of ours, one of the C library
    for angle, found in zip(ANGLES.tolist(), cos_and_sin(ANGLES)[part].tolist(), strict=True):
        assert abs(found - function(angle)) <= 3 * math.ulp(function(angle))


@pytest.mark.parametrize("angle", [0.5, -3.0, 31.4159265358979, 355.0])
def test_cos_and_sin_agree_with_their_series_in_decimals(angle: float) -> None:
    with localcontext() as context:
        context.prec = 400
        terms = [Decimal(1)]
        for number in range(1, 1500):
            terms.append(terms[-1] * Decimal(angle) / number)
        cos = sum((term * (-1) ** half for half, term in enumerate(terms[::2])), Decimal(0))
        sin = sum((term * (-1) ** half for half, term in enumerate(terms[1::2])), Decimal(0))
        for true, found in zip((cos, sin), cos_and_sin(np.array([angle])), strict=True):
            assert abs(Decimal(float(found[0])) - true) <= 2 * Decimal(math.ulp(float(true)))


def test_what_is_not_finite() -> None:
    found = exp(np.array([np.nan, np.inf, -np.inf, 1e9, -1e9]))
    assert np.array_equal(found, [np.nan, np.inf, 0, np.inf, 0], equal_nan=True)
    for values in cos_and_sin(np.array([np.nan, np.inf, -np.inf])):
        assert np.isnan(values).all()


@pytest.mark.parametrize("function", [exp, lambda x: cos_and_sin(x)[0], lambda x: cos_and_sin(x)[1]])
def test_a_value_does_not_depend_on_its_neighbours(function: Callable[[np.ndarray], np.ndarray]) -> None:
    whole = function(ANGLES)
    for size in (1, 2, 3, 7, 8, 17):
        for start in range(0, 400, 31):
            part = ANGLES[start : start + size]
            assert function(part).tobytes() == whole[start : start + size].tobytes()
    assert function(ANGLES[::3]).tobytes() == np.ascontiguousarray(whole[::3]).tobytes()
    assert function(ANGLES[:2000].reshape(40, 50).T).T.tobytes() == whole[:2000].tobytes()
    assert function(np.array(ANGLES[3])).shape == ()


def test_large_angles_are_reduced_exactly() -> None:
    angles = np.array([1e7, -1e7, 1647100.0, 5e15, 1e22, -3e100, 2.0**1000, np.finfo(np.float64).max])
    cos, sin = cos_and_sin(angles)
    with mpmath.workprec(2500):
        for angle, one, other in zip(angles.tolist(), cos, sin, strict=True):
            assert one == pytest.approx(float(mpmath.cos(mpmath.mpf(angle))), rel=5e-16)
            assert other == pytest.approx(float(mpmath.sin(mpmath.mpf(angle))), rel=5e-16)
