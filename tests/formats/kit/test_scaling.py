"""Alpha, rank and the factor of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import AssumptionContradicted
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.scaling import Scaling, agreed, scale_of

RANKS = st.integers(1, 512)


@given(st.floats(1e-6, 1e6), RANKS, st.booleans())
def test_alpha_gives_the_scale_back(scale: float, rank: int, by_root: bool) -> None:
    scaling = Scaling(by_root=by_root)
    assert scaling.factor(scaling.alpha(scale, rank), rank) == pytest.approx(scale, rel=3e-16)


@given(st.integers(1, 10_000), RANKS, st.booleans())
def test_an_integer_alpha_is_found_again(alpha: int, rank: int, by_root: bool) -> None:
    scaling = Scaling(by_root=by_root)
    scale = scaling.factor(alpha, rank)
    found = scaling.alpha(scale, rank)
    assert scaling.factor(found, rank) == scale
    assert found == alpha


def test_a_preferred_alpha_wins_where_it_is_exact() -> None:
    assert Scaling().alpha(2.0, 8, [32, 16.0]) == 16.0
    assert isinstance(Scaling().alpha(2.0, 8, [32, 16.0]), float)
    assert Scaling().alpha(2.0, 8, [32]) == 16


def test_what_is_stated_wins_over_silence_only() -> None:
    assert agreed(None, 3, "alpha", "here") == 3
    assert agreed(3, None, "alpha", "here") == 3
    assert agreed(3, 3.0, "alpha", "here") == 3
    with pytest.raises(AssumptionContradicted, match="here: the file states alpha 3, but 4 was given"):
        agreed(3, 4, "alpha", "here")


def test_the_scale_of_one_module() -> None:
    assert scale_of(8, 4, Scaling(), Hints(), "") == 2
    assert scale_of(None, 4, Scaling(), Hints(), "") is None
    assert scale_of(None, 4, Scaling(), Hints(scale=0.3), "") == 0.3
    assert scale_of(1, 3, Scaling(), Hints(scale=0.3333333333333), "") == 1 / 3
    with pytest.raises(AssumptionContradicted, match="a scale of"):
        scale_of(8, 4, Scaling(), Hints(scale=1.0), "")
