"""Singular values from the factors against torch.linalg.svdvals of the dense product, and what follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algebra.kinds import some, updates
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense

from loraformat.algebra import energy_ranks, frobenius, overlap, spectrum
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Replace, Update

SIZES = {"rows": st.integers(1, 30), "cols": st.integers(1, 30), "rank": st.integers(1, 8)}
SEEDS = st.integers(0, 2**31)


def matrices(update: Update) -> list[np.ndarray]:
    whole = dense(update)
    if isinstance(update, LowRank) and update.is_stack:
        return [one.numpy() for one in whole]
    return [whole.reshape(whole.shape[0], -1).numpy()]


def singular(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@settings(max_examples=30)
@given(**SIZES, seed=SEEDS)
def test_singular_values_agree_with_the_dense_ones(rows: int, cols: int, rank: int, seed: int) -> None:
    for kind, update in updates(rows, cols, rank, seed).items():
        found = spectrum(update)
        expected = np.sqrt(np.mean([singular(matrix) ** 2 for matrix in matrices(update)], axis=0))
        count = len(found.values)
        assert np.allclose(found.values, expected[:count], rtol=1e-9, atol=1e-9 * expected[0]), kind
        assert np.allclose(expected[count:], 0, atol=1e-9 * expected[0]), kind
        assert list(found.values) == sorted(found.values, reverse=True)


@settings(max_examples=30)
@given(**SIZES, seed=SEEDS)
def test_ranks_and_norms_agree_with_their_definitions(rows: int, cols: int, rank: int, seed: int) -> None:
    for kind, update in updates(rows, cols, rank, seed).items():
        found, each = spectrum(update), [singular(matrix) for matrix in matrices(update)]
        assert found.spectral_norm == pytest.approx(max(values[0] for values in each), rel=1e-9), kind
        stable = [
            np.linalg.norm(matrix) ** 2 / values[0] ** 2 for matrix, values in zip(matrices(update), each, strict=True)
        ]
        assert found.stable_rank == pytest.approx(np.median(stable), rel=1e-9), kind
        shares = [values / values.sum() for values in each]
        entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]
        assert found.effective_rank == pytest.approx(np.median(np.exp(entropies)), rel=1e-6), kind


@settings(max_examples=30)
@given(**SIZES, seed=SEEDS)
def test_ranks_are_ordered_and_energies_grow_to_one(rows: int, cols: int, rank: int, seed: int) -> None:
    for update in updates(rows, cols, rank, seed).values():
        found = spectrum(update)
        assert 1 - 1e-9 <= found.stable_rank <= len(found.values) + 1e-9
        assert 1 - 1e-9 <= found.effective_rank <= len(found.values) + 1e-9
        assert list(found.energies) == sorted(found.energies)
        assert found.energies[-1] == pytest.approx(1.0)
        assert found.energies[found.rank_holding(0.9) - 1] >= 0.9
        if len(matrices(update)) == 1:
            assert math.hypot(*found.values) == pytest.approx(frobenius(update), rel=1e-7)


def test_a_known_spectrum() -> None:
    """diag(3, 4) padded: norm 5, stable rank 25/16, one direction holds 64 % of the energy."""
    up, down = LazyTensor.of(torch.eye(6, 2)), LazyTensor.of(torch.diag(torch.tensor([3.0, 4.0])) @ torch.eye(2, 5))
    found = spectrum(LowRank(up, down, 1.0))
    assert found.values == pytest.approx((4.0, 3.0))
    assert found.stable_rank == pytest.approx(25 / 16)
    assert found.energies == pytest.approx((0.64, 1.0))
    assert (found.rank_holding(0.6), found.rank_holding(0.9)) == (1, 2)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.76, 1), (0.78, 2), (0.9, 2), (0.97, 3), (0.99, 3), (1.0, 4)])
def test_the_rank_that_holds_a_share_is_the_least(share: float, rank: int) -> None:
    """Of singular values 10, 5, 2, 1 the first hold 76.9, 96.2, 99.2 and 100 % of the squares."""
    down = torch.diag(torch.tensor([10.0, 5.0, 2.0, 1.0])) @ torch.eye(4, 5)
    found = spectrum(LowRank(LazyTensor.of(torch.eye(6, 4)), LazyTensor.of(down), 1.0))
    assert found.rank_holding(share) == rank


def test_a_zero_update_has_rank_zero() -> None:
    up, down = LazyTensor.of(torch.zeros(6, 2)), LazyTensor.of(torch.ones(2, 5))
    found = spectrum(LowRank(up, down, 1.0))
    assert (found.spectral_norm, found.stable_rank, found.effective_rank, found.energies) == (0, 0, 0, ())
    assert found.rank_holding(0.9) == 0


def test_values_that_are_not_finite_have_no_spectrum() -> None:
    up, down = LazyTensor.of(torch.full((6, 2), math.nan)), LazyTensor.of(torch.ones(2, 5))
    assert spectrum(LowRank(up, down, 1.0)) is None
    assert overlap(LowRank(up, down, 1.0), LowRank(up, down, 1.0)) is None


def test_a_spectrum_needs_a_scale_and_a_difference() -> None:
    up, down = some(0, (6, 2), (2, 3))
    assert spectrum(LowRank(up, down, None)) is None
    assert spectrum(Replace(up)) is None


@settings(max_examples=30)
@given(**SIZES, one=SEEDS, other=SEEDS)
def test_overlaps_agree_with_projectors_of_the_dense_product(
    rows: int, cols: int, rank: int, one: int, other: int
) -> None:
    """‖U₁ᵀU₂‖² is the trace of the product of the two projectors, which no choice of basis changes."""
    first, second = (updates(rows, cols, rank, seed)["linear"] for seed in (one, other))
    count = min(rows, cols, rank)
    found = overlap(first, second, dimensions=count)
    if found.dimensions < count:
        return
    projectors = []
    for update in (first, second):
        left, _, right = np.linalg.svd(dense(update).numpy())
        projectors.append((left[:, :count] @ left[:, :count].T, right[:count].T @ right[:count]))
    expected = [np.trace(a @ b) / count for a, b in zip(*projectors, strict=True)]
    assert (found.outputs, found.inputs) == pytest.approx(expected, abs=1e-5)


def test_the_same_subspace_overlaps_wholly_and_another_not_at_all() -> None:
    basis = torch.eye(8)
    up, other, down = (LazyTensor.of(each) for each in (basis[:, :2], basis[:, 2:4], basis[:2]))
    same = overlap(LowRank(up, down, 1.0), LowRank(up, down, -2.0))
    apart = overlap(LowRank(up, down, 1.0), LowRank(other, down, 1.0))
    assert (same.dimensions, same.outputs, same.inputs) == pytest.approx((2, 1.0, 1.0))
    assert (apart.outputs, apart.inputs) == pytest.approx((0.0, 1.0))


def with_values(values: list[float], rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values, between random orthonormal columns."""
    g = np.random.default_rng(seed)
    left, right = (np.linalg.qr(g.standard_normal((size, len(values)))).Q for size in (rows, cols))
    return (left * values) @ right.T


@pytest.mark.parametrize(("rows", "cols"), [(12, 9), (9, 12)])
def test_ranks_of_a_whole_matrix_are_those_of_its_singular_values(rows: int, cols: int) -> None:
    """Of 10, 5, 2, 1 the first hold 76.9, 96.2, 99.2 and 100 % of the squares."""
    matrix = with_values([10, 5, 2, 1], rows, cols)
    shares = np.array([10, 5, 2, 1]) / 18
    effective, ranks = energy_ranks(matrix, (0.5, 0.9, 0.97, 0.995))
    assert effective == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert ranks == (1, 2, 3, 4)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_matrix_of_nothing_or_of_what_is_not_finite_has_no_ranks(value: float) -> None:
    assert energy_ranks(np.full((3, 4), value), (0.5, 0.9)) == (None, (None, None))


@pytest.mark.parametrize(("rows", "cols"), [(40, 30), (30, 40)])
def test_ranks_of_a_large_matrix_are_those_of_its_leading_subspace(rows: int, cols: int) -> None:
    matrix = with_values([100.0, 80, 60, 40, *([1e-3] * 20)], rows, cols)
    effective, ranks = energy_ranks(matrix, (0.4, 0.9, 0.999), most=8)
    assert effective is None  # it needs all singular values
    assert ranks == (1, 3, 4)
    assert energy_ranks(matrix, (0.4, 0.9, 0.999), most=8) == (None, ranks)
    flat = with_values([1.0] * 24, rows, cols)
    assert energy_ranks(flat, (0.2, 0.9), most=8)[1] == (5, None)  # 8 of 24 hold a third
    effective, ranks = energy_ranks(flat, (0.2, 0.9), most=min(rows, cols))
    assert (effective, ranks) == (pytest.approx(24.0), (5, 22))


def test_a_share_that_is_held_exactly_is_held() -> None:
    assert energy_ranks(np.eye(4), (0.25, 0.5, 1.0)) == (pytest.approx(4.0), (1, 2, 4))


@pytest.mark.parametrize("size", [1024, 1030])
def test_leading_subspaces_of_matrices_without_factors(size: int) -> None:
    """Above 1024 they are found by iteration, with the same overlaps."""
    values = [9.0, 8.0, 7.0, 6.0]
    one, other = (with_values(values, size, size, seed) for seed in (0, 1))
    updates = [Dense(LazyTensor.of(each)) for each in (one, other)]
    same = overlap(updates[0], updates[0], dimensions=4)
    assert (same.dimensions, same.outputs, same.inputs) == pytest.approx((4, 1.0, 1.0))
    found = overlap(*updates, dimensions=4)
    bases = [[np.linalg.qr(each[:, :4]).Q, np.linalg.qr(each.T[:, :4]).Q] for each in (one, other)]
    wanted = [np.sum((bases[0][side].T @ bases[1][side]) ** 2) / 4 for side in (0, 1)]
    assert (found.outputs, found.inputs) == pytest.approx(wanted, abs=1e-9)


def test_directions_of_noise_do_not_count() -> None:
    basis = np.eye(6, dtype=np.float64)
    for last, dimensions in ((1e-5, 3), (1e-7, 2)):
        update = Dense(LazyTensor.of(basis[:, :3] * [1.0, 0.5, last] @ basis[:3]))
        assert overlap(update, update).dimensions == dimensions
        assert overlap(update, update, dimensions=1).dimensions == 1


def test_the_overlap_of_stacks_is_the_mean_of_their_experts() -> None:
    basis = torch.eye(8)
    up = LazyTensor.of(torch.stack([basis[:, :2], basis[:, :2]]))
    other = LazyTensor.of(torch.stack([basis[:, :2], basis[:, 2:4]]))
    down = LazyTensor.of(torch.stack([basis[:2], basis[:2]]))
    found = overlap(LowRank(up, down, 1.0), LowRank(other, down, 1.0))
    assert (found.dimensions, found.outputs, found.inputs) == pytest.approx((2, 0.5, 1.0))


def test_updates_that_are_zero_or_of_another_shape_have_no_overlap() -> None:
    some_update, zero = Dense(LazyTensor.of(torch.eye(4))), Dense(LazyTensor.of(torch.zeros(4, 4)))
    assert overlap(some_update, zero) is None
    assert overlap(zero, some_update) is None
    assert overlap(some_update, Dense(LazyTensor.of(torch.ones(4, 5)))) is None
    assert overlap(some_update, Replace(LazyTensor.of(torch.eye(4)))) is None


def test_the_iteration_finds_the_leading_subspace_among_smaller_values() -> None:
    diagonal = np.zeros(1030)
    diagonal[:44] = [9.0, 8.0, 7.0, 6.0, *([2.0] * 40)]
    one, other = (Dense(LazyTensor.of(np.diag(np.roll(diagonal, places)))) for places in (0, 2))
    found = overlap(one, other, dimensions=4)
    assert (found.dimensions, found.outputs, found.inputs) == pytest.approx((4, 0.5, 0.5), abs=1e-3)
