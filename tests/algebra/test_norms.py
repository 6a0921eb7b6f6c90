"""Norms, inner products and distances from the factors against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from algebra.kinds import some, updates
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense

from loraformat.algebra import cosine, distance, frobenius, inner
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Hadamard, Kronecker, LowRank, Replace, Rows

SIZES = {"rows": st.integers(1, 30), "cols": st.integers(1, 30), "rank": st.integers(1, 8)}
SEEDS = st.integers(0, 2**31)


@settings(max_examples=30)
@given(**SIZES, seed=SEEDS)
def test_norms_agree_with_the_dense_product(rows: int, cols: int, rank: int, seed: int) -> None:
    for kind, update in updates(rows, cols, rank, seed).items():
        expected = float(dense(update).norm())
        assert frobenius(update) == pytest.approx(expected, rel=1e-7, abs=1e-12), kind


@settings(max_examples=30)
@given(**SIZES, one=SEEDS, other=SEEDS)
def test_products_and_distances_agree_with_the_dense_ones(
    rows: int, cols: int, rank: int, one: int, other: int
) -> None:
    second = updates(rows, cols, min(rank + 1, 8), other)
    for kind, update in updates(rows, cols, rank, one).items():
        partner = second[kind]
        if dense(update).shape != dense(partner).shape:
            assert inner(update, partner) is None
            continue
        first, last = dense(update).flatten(), dense(partner).flatten()
        whole = float(first.norm() * last.norm())
        assert inner(update, partner) == pytest.approx(float(first @ last), abs=1e-9 * whole), kind
        assert cosine(update, partner) == pytest.approx(float(first @ last) / whole, abs=1e-7), kind
        # float64 of factors side by side keeps half the digits where the two nearly agree
        assert distance(update, partner) == pytest.approx(float((first - last).norm()), abs=1e-7 * whole**0.5), kind


@settings(max_examples=30)
@given(**SIZES, seed=SEEDS)
def test_an_update_is_like_itself(rows: int, cols: int, rank: int, seed: int) -> None:
    for kind, update in updates(rows, cols, rank, seed).items():
        assert cosine(update, update) == pytest.approx(1.0, abs=1e-9), kind
        assert distance(update, update) <= 1e-7 * frobenius(update), kind


def test_kinds_compare_with_each_other() -> None:
    made = updates(9, 7, 2, 5)
    for one, other in (("linear", "dense"), ("dense", "loha"), ("loha", "linear")):
        expected = float((dense(made[one]) * dense(made[other])).sum())
        assert inner(made[one], made[other]) == pytest.approx(expected, rel=1e-9)


def test_a_product_that_nearly_cancels_keeps_its_digits() -> None:
    """up @ down of two nearly opposite terms: the Gram matrices alone would leave no digit."""
    column, row = torch.randn(50, 1).double(), torch.randn(1, 40).double()
    update = LowRank(
        LazyTensor.of(torch.cat([column, -column * (1 + 1e-9)], dim=1)),
        LazyTensor.of(torch.cat([row, row], dim=0)),
        1.0,
    )
    assert frobenius(update) == pytest.approx(1e-9 * float(column.norm() * row.norm()), rel=1e-5)


def test_convolutions_count_every_kernel_position() -> None:
    up, down = some(0, (6, 2), (2, 3 * 9))
    update = LowRank(up, down, 1.5, kernel=(3, 3))
    assert frobenius(update) == pytest.approx(float(dense(update).norm()), rel=1e-9)


def test_half_precision_factors_are_summed_in_float64() -> None:
    up, down = (LazyTensor.of(torch.full(shape, 300.0, dtype=torch.float16)) for shape in ((4, 2), (2, 4)))
    assert frobenius(LowRank(up, down, 1.0)) == pytest.approx(300.0 * 300.0 * 2 * 4, rel=1e-12)


def test_a_norm_needs_a_scale_and_a_difference() -> None:
    up, down = some(0, (6, 2), (2, 3))
    assert frobenius(LowRank(up, down, None)) is None
    assert frobenius(Replace(up)) is None
    assert frobenius(Rows((0, 1, 2, 3, 4, 5), up)) is None
    assert cosine(LowRank(up, down, 0.0), LowRank(up, down, 1.0)) is None


def test_factors_that_do_not_fit_have_no_norm() -> None:
    up, down = some(0, (6, 2), (3, 4))
    assert frobenius(LowRank(up, down, 1.0)) is None
    assert frobenius(Hadamard(up, down, up, down, 1.0)) is None
    assert frobenius(Kronecker((up,), (up, down), 1.0)) is None
