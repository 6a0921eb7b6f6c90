"""Whether two updates change a weight by the same amount, up to what rounding may do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loraformat.algebra.agreement import Agreement, agreement
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows, Update

ROUNDOFF = 2.0**-8
OTHER = Agreement(is_exact=False, is_same_kind=False)


def lazy(values: object, dtype: torch.dtype = torch.float32) -> LazyTensor:
    return LazyTensor.of(torch.tensor(values, dtype=dtype))


def one(up: float, down: float = 1.0, scale: float | None = 1.0, magnitude: float | None = None) -> LowRank:
    vector = None if magnitude is None else Magnitude(lazy([magnitude]))
    return LowRank(lazy([[up]]), lazy([[down]]), scale, vector)


def test_equal_updates_agree_exactly() -> None:
    for update in (one(3.0, 2.0), Dense(lazy([1.0])), Replace(lazy([[1.0]])), Rows((2,), lazy([[1.0]]))):
        assert agreement(update, update, 0.0) == Agreement(is_exact=True)
        assert agreement(update, update, 0.0).holds


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (Dense(lazy([1.0])), Replace(lazy([1.0]))),
        (Rows((1,), lazy([[1.0]])), Rows((2,), lazy([[1.0]]))),
        (Dense(lazy([1.0])), Dense(lazy([1.0, 1.0]))),
        (Dense(lazy([[1.0]])), Dense(lazy([1.0]))),
        (one(1.0), replace(one(1.0), is_embedding=True)),
        (Replace(lazy([1.0])), Replace(lazy([1.0]), follows_tie=False)),
    ],
)
def test_updates_of_another_kind_cannot_be_compared(found: Update, wanted: Update) -> None:
    assert agreement(found, wanted, 1.0) == OTHER
    assert not OTHER.holds


@pytest.mark.parametrize("kind", [Dense, Replace])
def test_a_value_may_be_off_by_its_share(kind: type) -> None:
    wanted = kind(lazy([4.0, 0.0]))
    for factor in (1 + ROUNDOFF, 1 - ROUNDOFF):
        found = agreement(kind(lazy([4.0 * factor, 0.0])), wanted, ROUNDOFF)
        assert (found.is_exact, found.holds) == (False, True)
        assert found.error == pytest.approx(1.0)
    assert not agreement(kind(lazy([4.0 * (1 + 1.01 * ROUNDOFF), 0.0])), wanted, ROUNDOFF).holds
    assert not agreement(kind(lazy([4.0, 1e-30])), wanted, ROUNDOFF).holds
    assert not agreement(kind(lazy([float("inf"), 0.0])), wanted, ROUNDOFF).holds


def test_a_dense_update_counts_with_its_scale() -> None:
    wanted = Dense(lazy([4.0, 2.0]), 0.5)
    assert agreement(Dense(lazy([2.0, 1.0])), wanted, 0.0).holds
    assert agreement(Dense(lazy([2.0, 1.0]), 1.0), wanted, 0.0).error == 0.0
    assert not agreement(Dense(lazy([4.0, 2.0]), 1.0), wanted, ROUNDOFF).holds
    assert not agreement(Dense(lazy([4.0, 2.0]), -0.5), wanted, ROUNDOFF).holds


def test_factors_may_be_other_ones_of_the_same_product() -> None:
    assert agreement(one(8.0, 0.5), one(1.0, 4.0), 0.0).holds
    assert agreement(one(1.0, 4.0, scale=2.0), one(1.0, 8.0), 0.0).holds
    assert not agreement(one(1.0, 4.0, scale=2.0), one(1.0, 4.0), ROUNDOFF).holds
    assert not agreement(one(1.0, -4.0), one(1.0, 4.0), ROUNDOFF).holds


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (1.02, False)])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_both_factors_of_a_product_may_be_rounded(share: float, holds: bool, scale: float) -> None:
    """(1 + u)² - 1 is 2u + u²."""
    step = 1 + share * ROUNDOFF
    found = agreement(one(4.0 * step, step, scale), one(4.0, 1.0, scale), ROUNDOFF)
    assert found.holds is holds
    assert found.error == pytest.approx(((step * step) - 1) / ((1 + ROUNDOFF) ** 2 - 1), rel=1e-4)


def test_values_of_a_product_are_judged_one_by_one() -> None:
    """A large value does not hide the error of a small one, in a row or in a column."""
    wanted = LowRank(lazy([[1000.0], [1.0]]), lazy([[1.0, 1.0]]), 1.0)
    assert not agreement(replace(wanted, up=lazy([[1000.0], [1.1]])), wanted, ROUNDOFF).holds
    assert agreement(replace(wanted, up=lazy([[1001.0], [1.0]])), wanted, ROUNDOFF).holds


def test_what_rounding_loses_below_the_normal_numbers_is_allowed_where_values_were_rounded() -> None:
    small = 2.0**-25  # half of float16's smallest number
    half = torch.float16
    wanted = LowRank(lazy([[small]]), lazy([[1.0]]), 1.0)
    found = LowRank(lazy([[0.0]], half), lazy([[1.0]], half), 1.0)
    assert agreement(found, wanted, 2.0**-11).holds
    assert not agreement(found, wanted, 0.0).holds
    assert not agreement(found, replace(wanted, up=lazy([[8 * small]])), 2.0**-11).holds


def test_a_magnitude_may_be_off_by_its_share() -> None:
    wanted = one(1.0, magnitude=4.0)
    assert agreement(one(1.0, magnitude=4.0 * (1 + ROUNDOFF)), wanted, ROUNDOFF).holds
    assert not agreement(one(1.0, magnitude=4.0 * (1 + 1.01 * ROUNDOFF)), wanted, ROUNDOFF).holds
    assert not agreement(one(1.0, magnitude=-4.0), wanted, ROUNDOFF).holds


def test_equal_values_of_other_dtypes_are_not_the_same_bits() -> None:
    found = agreement(Dense(lazy([1.0], torch.bfloat16)), Dense(lazy([1.0])), 0.0)
    assert (found.is_exact, found.holds, found.error) == (False, True, 0.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_agrees_with_itself_alone(odd: float) -> None:
    for other in (0.0, 1.0, 1e30, math.nan, math.inf, -math.inf):
        is_same = other == odd or (math.isnan(odd) and math.isnan(other))
        for found, wanted in ((odd, other), (other, odd)):
            assert agreement(Dense(lazy([1.0, found])), Dense(lazy([1.0, wanted])), ROUNDOFF).holds is is_same
            assert agreement(one(found), replace(one(wanted), down=lazy([[1.0]])), ROUNDOFF).holds is is_same
            assert agreement(one(1.0, magnitude=found), one(1.0, magnitude=wanted), ROUNDOFF).holds is is_same


def test_empty_updates_agree() -> None:
    empty = Dense(LazyTensor.of(torch.zeros(0, 3)))
    assert agreement(empty, Dense(LazyTensor.of(torch.zeros(0, 3)), 2.0), 0.0).holds
