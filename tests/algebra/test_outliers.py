"""Norms that lie far from those of their group."""

from __future__ import annotations

import math

import pytest

from loraformat.algebra.outliers import outliers


def found(norms: dict[str, float | None], group: str = "g") -> dict[str, float]:
    return dict(outliers((name, group, norm) for name, norm in norms.items()))


def test_a_norm_stands_out_with_the_median_of_its_group() -> None:
    norms = {"a": 2.0, "b": 2.0, "c": 2.0, "d": 2.0, "e": 20.0}
    assert found(norms) == pytest.approx({"e": 2.0})
    assert found({**norms, "e": 0.2}) == pytest.approx({"e": 2.0})


@pytest.mark.parametrize(("factor", "is_told"), [(2.39, False), (2.4, True), (1 / 2.39, False), (1 / 2.4, True)])
def test_of_equal_norms_one_stands_out_from_2_4_times_the_others_on(factor: float, is_told: bool) -> None:
    """exp(3.5 · 0.25) is 2.399."""
    assert list(found({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": factor})) == ["e"] * is_told


@pytest.mark.parametrize(("factor", "is_told"), [(math.exp(5.1), False), (math.exp(5.3), True)])
def test_where_norms_spread_one_must_lie_further_off(factor: float, is_told: bool) -> None:
    """Deviations of the logarithms are 0, 1, 1, 1 and the last: 3.5 · 1.4826 · 1 is 5.19."""
    norms = {"a": 1.0, "b": math.e, "c": 1 / math.e, "d": 1 / math.e, "e": math.e, "f": 1.0, "g": factor}
    assert list(found(norms)) == ["g"] * (factor > math.exp(3.5 * 1.4826))
    assert (factor > math.exp(3.5 * 1.4826)) is is_told


def test_four_norms_have_no_outlier_and_five_have() -> None:
    norms = {"a": 1.0, "b": 1.0, "c": 1.0, "e": 1000.0}
    assert found(norms) == {}
    assert list(found({**norms, "d": 1.0})) == ["e"]


@pytest.mark.parametrize("norm", [0.0, None, math.inf, math.nan])
def test_norms_that_say_nothing_neither_stand_out_nor_count(norm: float | None) -> None:
    norms = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1000.0}
    assert found({**norms, "x": norm}) == {}
    assert list(found({**norms, "e": 1.0, "x": norm})) == ["d"]


def test_groups_are_judged_each_by_itself() -> None:
    small = [(("s", n), "small", 1.0) for n in range(5)]
    large = [(("l", n), "large", 1000.0) for n in range(5)]
    assert dict(outliers([*small, *large])) == {}
    assert dict(outliers([*small, *large, ("x", "large", 1.0)])) == pytest.approx({"x": 1000.0})
