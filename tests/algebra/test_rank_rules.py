"""Rules of ranks against their definitions, and the size budget against every other choice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loraformat.algebra.decomposition import Decomposition
from loraformat.algebra.rank_rules import RankRule, ranks_of

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9).map(lambda found: sorted(found, reverse=True))


def of(values: list[float], residual: float = 0.0) -> Decomposition:
    count = len(values)
    return Decomposition(np.eye(count), np.array(values), np.eye(count), residual)


MEETS: dict[str, Callable[[np.ndarray[Any, Any], int, float], bool]] = {
    "energy": lambda s, k, value: (s[:k] ** 2).sum() >= value * (s**2).sum(),
    "sv_fro": lambda s, k, value: np.sqrt((s[:k] ** 2).sum()) >= value * np.sqrt((s**2).sum()),
    "error": lambda s, k, value: np.sqrt((s[k:] ** 2).sum()) <= value * np.sqrt((s**2).sum()),
    "sv_cumulative": lambda s, k, value: s[:k].sum() >= value * s.sum(),
    "sv_ratio": lambda s, k, value: k >= (s >= s[0] / value).sum(),
}


@pytest.mark.parametrize("name", MEETS)
@given(values=SPECTRA, share=st.floats(0.01, 0.99))
def test_the_least_rank_that_meets_a_bound(name: str, values: list[float], share: float) -> None:
    bound = 1 / share if name == "sv_ratio" else share
    exact = np.array(values)
    wanted = next((k for k in range(1, len(values) + 1) if MEETS[name](exact, k, bound)), len(values))
    # Not where rounding decides which side of the bound a rank is on.
    for shift in (1 - 1e-12, 1 + 1e-12):
        near = next((k for k in range(1, len(values) + 1) if MEETS[name](exact, k, bound * shift)), len(values))
        assume(near == wanted)
    assert RankRule(**{name: bound}).least(of(values)) == wanted


def test_of_several_rules_the_largest_rank_holds_up_to_the_limit() -> None:
    found = of([8.0, 4.0, 2.0, 1.0])
    assert RankRule(rank=1, sv_ratio=4).least(found) == 3
    assert RankRule(rank=1, sv_ratio=4, max_rank=2).least(found) == 2
    assert RankRule(rank=9).least(found) == 4
    assert RankRule(rank=2).least(Decomposition(np.eye(3)[:, :0], np.zeros(0), np.eye(3)[:0])) == 0


def test_kohyas_three_keep_no_value_more_than_they_need() -> None:
    """What kohya's resize kept before its pull request 2194 was one more in each case."""
    found = of([float(9 - k) for k in range(9)])
    assert RankRule(sv_ratio=3).least(found) == 7
    assert RankRule(sv_cumulative=0.5).least(found) == 3
    assert RankRule(sv_fro=0.8).least(found) == 3


def test_what_is_left_out_counts() -> None:
    assert RankRule(energy=0.9).least(of([2.0, 1.0])) == 2
    assert RankRule(energy=0.9).holds_within(of([2.0, 1.0]))
    assert not RankRule(energy=0.9).holds_within(of([2.0, 1.0], residual=1.0))
    assert not RankRule(error=0.1).holds_within(of([2.0, 1.0], residual=1.0))
    assert RankRule(rank=2).holds_within(of([2.0, 1.0], residual=1.0))
    assert not RankRule(sv_ratio=4).holds_within(of([2.0, 1.0], residual=0.5))


@given(
    several=st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=3), min_size=1, max_size=3),
    size=st.integers(0, 8),
)
def test_a_size_keeps_as_much_as_any_choice_of_as_many_bytes(several: list[list[float]], size: int) -> None:
    """All updates cost the same here, where the greedy choice is the best of all."""
    spectra = {at: [of(sorted(values, reverse=True))] for at, values in enumerate(several)}
    found = ranks_of(RankRule(size=size * 10), spectra, dict.fromkeys(spectra, 10))
    assert sum(found.values()) * 10 <= size * 10

    def held(ranks: dict[int, int]) -> float:
        return sum(float((spectra[at][0].values[:rank] ** 2).sum()) for at, rank in ranks.items())

    choices = product(*(range(spectra[at][0].rank + 1) for at in spectra))
    best = max(held(dict(enumerate(choice))) for choice in choices if sum(choice) <= size)
    assert held(found) == pytest.approx(best)


def test_a_size_prefers_what_is_cheap() -> None:
    spectra = {"wide": [of([3.0, 1.0])], "narrow": [of([2.0, 1.9])]}
    assert ranks_of(RankRule(size=300), spectra, {"wide": 300, "narrow": 100}) == {"wide": 0, "narrow": 2}
    assert ranks_of(RankRule(size=300, max_rank=1), spectra, {"wide": 100, "narrow": 100}) == {"wide": 1, "narrow": 1}
