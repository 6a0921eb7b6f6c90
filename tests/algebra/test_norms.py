"""Norms from the factors against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense

from loraformat.algebra import frobenius
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Diff, Hadamard, Kronecker, LowRank, Replace, Rows, Update


def some(seed: int, *shapes: tuple[int, ...]) -> list[LazyTensor]:
    g = torch.Generator().manual_seed(seed)
    return [LazyTensor.of(torch.randn(*shape, generator=g)) for shape in shapes]


def updates(rows: int, cols: int, rank: int, seed: int) -> list[Update]:
    up, down, up2, down2, full = some(seed, (rows, rank), (rank, cols), (rows, rank), (rank, cols), (rows, cols))
    return [
        LowRank(up, down, 0.7),
        LowRank(up, down.reshape(rank, cols), -3.0),
        Hadamard(up, down, up2, down2, 0.3),
        Kronecker((up,), (down,), 2.0),
        Kronecker((up, down), (up2, down2), 1.0),
        Diff(full, 0.5),
    ]


@given(rows=st.integers(1, 30), cols=st.integers(1, 30), rank=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_norms_agree_with_the_dense_product(rows: int, cols: int, rank: int, seed: int) -> None:
    for update in updates(rows, cols, rank, seed):
        # float64 Gram matrices lose half the digits where the product nearly cancels
        expected = float(dense(update).norm())
        assert frobenius(update) == pytest.approx(expected, rel=1e-7, abs=1e-7)


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


def test_factors_that_do_not_fit_have_no_norm() -> None:
    up, down = some(0, (6, 2), (3, 4))
    assert frobenius(LowRank(up, down, 1.0)) is None
    assert frobenius(Hadamard(up, down, up, down, 1.0)) is None
    assert frobenius(Kronecker((up,), (up, down), 1.0)) is None
