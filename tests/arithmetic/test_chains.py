"""Fused multiply-adds without an instruction, against rationals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arithmetic.cases import exact_chain
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.arithmetic.chains import chains

SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MODERATE = st.floats(-(2.0**400), 2.0**400, allow_nan=False).map(lambda x: x if abs(x) >= 2.0**-400 else 0.0)
ANY = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("numbers", [SINGLE, MODERATE, ANY], ids=["float32", "moderate", "any"])
def test_chains_are_those_of_rationals(numbers: st.SearchStrategy[float]) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
    def check(terms: list[tuple[float, float]]) -> None:
        left, right = (np.array(side)[:, None] for side in zip(*terms, strict=True))
        found = float(chains(left, right)[0])
        wanted = exact_chain(left[:, 0], right[:, 0])
        assert found == wanted or math.isnan(found)
        assert math.isfinite(wanted) or not math.isfinite(found)

    check()


def test_terms_that_decide_by_their_last_bit() -> None:
    """The product's error, far below the sum, pushes it off the middle between two neighbors."""
    last = 2.0**-52
    one = np.array([[1.0], [1 + last], [-(1 + last)], [1.0]])
    other = np.array([[1.0], [2.0**-53 * (1 - last)], [2.0**-53 * (1 + last)], [3.0]])
    for terms in (slice(0, 2), slice(0, 3), slice(0, 4)):
        assert chains(one[terms], other[terms])[0] == exact_chain(one[terms, 0], other[terms, 0])


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 0.1])
def test_random_sums_with_cancellation(scale: float) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((8, 500)) * scale, rng.standard_normal((8, 500))
    left[4:], right[4:] = -left[:4] * (1 + 2.0**-52 * rng.integers(-2, 3, (4, 500))), right[:4]
    found = chains(left, right)
    assert found.tolist() == [exact_chain(one, other) for one, other in zip(left.T, right.T, strict=True)]


def test_signs_of_zero_and_overflow() -> None:
    def one(*terms: tuple[float, float]) -> float:
        return float(chains(np.array([[a] for a, _ in terms]), np.array([[b] for _, b in terms]))[0])

    assert math.copysign(1, one((-0.0, 1e300))) == 1  # 0 - 0
    assert math.copysign(1, one((-1e-300, 1e-300))) == -1  # rounds to zero from below
    assert math.copysign(1, one((-1e-300, 1e-300), (1e-300, 0.0))) == 1
    assert math.copysign(1, one((-1e-300, 1e-300), (1e-300, -0.0))) == -1
    assert one((1e300, 1e300)) == math.inf
    assert one((1e300, 1e300), (1.0, 1.0)) == math.inf
    assert math.isnan(one((1e300, 1e300), (-1e300, 1e300), (math.inf, -1.0)))


def test_shapes_broadcast() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((3, 4, 1)), rng.standard_normal((3, 1, 5))
    found = chains(left, right)
    assert found.shape == (4, 5)
    assert found[2, 3] == exact_chain(left[:, 2, 0], right[:, 0, 3])
    assert chains(left[:0], right[:0]).tolist() == [[0.0] * 5] * 4
