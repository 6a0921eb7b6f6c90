"""Differences of weights: exact in float64, with the floor of rounding, and near the optimum in three passes."""

from __future__ import annotations

import numpy as np
import pytest

from loraformat.algebra.factors import Product
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import leading
from loraformat.algebra.weights.difference import Difference, measure, retained
from loraformat.model.tensors import DType, LazyTensor, rounded

SPECTRA = {
    "i^-1/4": lambda i: i**-0.25,
    "i^-1/2": lambda i: i**-0.5,
    "1/i": lambda i: 1.0 / i,
    "i^-2": lambda i: i**-2.0,
    "exp(-i/40)": lambda i: np.exp(-i / 40),
    "flat": np.ones_like,
    "rank 64 and noise .3": lambda i: np.where(i <= 64, 1.0, 0.3),
    "rank 64 in noise 3": lambda i: np.hypot(np.where(i <= 64, 1.0, 0.0), 3 * (1 - i / 800)),
}
RANK = 32


def pair(name: str, dtype: DType, rows: int = 900, cols: int = 640, size: float = 1e-2) -> Difference:
    """A weight and the same with a change of a spectrum and of the size ‖Δ‖/‖W‖, both rounded to a dtype."""
    g = np.random.default_rng(3)
    values = SPECTRA[name](np.arange(1.0, cols + 1))
    left = np.linalg.qr(g.standard_normal((rows, cols)))[0]
    change = left * values @ np.linalg.qr(g.standard_normal((cols, cols)))[0]
    base = rounded(g.standard_normal((rows, cols)) * 0.02, dtype)
    change *= size * np.linalg.norm(base) / np.linalg.norm(change)
    return Difference(LazyTensor.of(base, dtype), LazyTensor.of(rounded(base + change, dtype), dtype))


def whole(difference: Difference) -> np.ndarray:
    after, before = difference.after.read(0, 10**6), difference.before.read(0, 10**6)
    return after.astype(np.float64) - before.astype(np.float64)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda each: each.safetensors)
@pytest.mark.parametrize("name", SPECTRA)
def test_three_passes_are_within_a_percent_and_the_error_is_the_true_one(name: str, dtype: DType) -> None:
    difference = pair(name, dtype)
    exact = whole(difference)
    values = np.linalg.svd(exact, compute_uv=False)
    found = leading(difference, RankRule(rank=RANK), 3)
    assert found.residual > 0, "the search, not the full decomposition"
    kept = found.factors(RANK)
    error, optimum = np.linalg.norm(exact - kept.left @ kept.right), np.sqrt((values[RANK:] ** 2).sum())
    assert optimum * (1 - 1e-9) <= error <= 1.01 * optimum
    assert abs(found.tail(RANK) - error) <= 1e-6 * found.norm
    assert found.tail(RANK) == pytest.approx(error, rel=1e-6)


def test_an_error_far_below_the_norm_keeps_its_digits() -> None:
    """‖Δ‖² − Σσ² would read 0 or worse."""
    g = np.random.default_rng(5)
    low = g.standard_normal((900, 8)) @ g.standard_normal((8, 640))
    noise = 1e-9 * g.standard_normal((900, 640))
    before = np.zeros((900, 640))
    found = leading(Difference(LazyTensor.of(before), LazyTensor.of(low + noise)), RankRule(rank=8), 3)
    kept = found.factors(8)
    assert found.tail(8) == pytest.approx(np.linalg.norm(low + noise - kept.left @ kept.right), rel=1e-4)


def test_neither_what_is_held_nor_how_it_is_read_changes_a_bit() -> None:
    difference = pair("1/i", DType.BF16)
    held, streamed = (leading(difference, RankRule(rank=RANK), 3, held_nbytes=size) for size in (1 << 30, 0))
    for one, other in ((held.left, streamed.left), (held.values, streamed.values), (held.right, streamed.right)):
        assert one.tobytes() == other.tobytes()
    assert held.residual == streamed.residual


def test_another_seed_begins_elsewhere_and_ends_near() -> None:
    difference = pair("exp(-i/40)", DType.F32)
    one, other = (leading(difference, RankRule(rank=RANK), 3, seed=seed) for seed in (0, 1))
    assert one.values.tobytes() != other.values.tobytes()
    assert one.values[:RANK] == pytest.approx(other.values[:RANK], rel=1e-2)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda each: each.safetensors)
@pytest.mark.parametrize("size", [1e-1, 1e-2])
def test_the_floor_is_what_rounding_leaves(dtype: DType, size: float) -> None:
    g = np.random.default_rng(7)
    base = rounded(g.standard_normal((600, 500)), dtype)
    change = g.standard_normal((600, 500)) * size
    after = rounded(base + change, dtype)
    found, _ = measure(Difference(LazyTensor.of(base, dtype), LazyTensor.of(after, dtype)))
    noise = np.linalg.norm(after.astype(np.float64) - (base + change))
    assert found.floor == pytest.approx(noise, rel=0.02)
    assert found.norm == pytest.approx(np.linalg.norm(after.astype(np.float64) - base), rel=1e-12)


def test_no_bound_chases_rounding() -> None:
    """The change has rank 4; rounding to bfloat16 gives the difference of the files full rank."""
    g = np.random.default_rng(9)
    base = rounded(g.standard_normal((700, 600)) * 0.02, DType.BF16)
    change = g.standard_normal((700, 4)) @ g.standard_normal((4, 600)) * 1e-4
    after = rounded(base + change, DType.BF16)
    difference = Difference(LazyTensor.of(base, DType.BF16), LazyTensor.of(after, DType.BF16))
    measured, _ = measure(difference)
    rule = RankRule(energy=0.9999, floor=measured.floor)
    assert rule.least(leading(difference, rule, 3)) < 32
    blind = RankRule(energy=0.9999)
    assert blind.least(leading(difference, blind, 3)) > 300


def test_not_finite_is_seen() -> None:
    values = np.ones((3, 4), np.float32)
    broken = values.copy()
    broken[2, 1] = np.inf
    assert not measure(Difference(LazyTensor.of(values), LazyTensor.of(broken)))[0].is_finite
    assert measure(Difference(LazyTensor.of(values), LazyTensor.of(2 * values)))[0].is_finite


def test_the_share_that_rounding_keeps() -> None:
    g = np.random.default_rng(11)
    base = rounded(g.standard_normal((300, 40)), DType.BF16)
    factors = Product(g.standard_normal((300, 2)) * 1e-3, g.standard_normal((2, 40)))
    change = factors.left @ factors.right
    kept, squares = retained(LazyTensor.of(base, DType.BF16), factors, DType.BF16)
    written = rounded(base + change, DType.BF16).astype(np.float64) - base
    assert kept == pytest.approx((written * change).sum(), rel=1e-9)
    assert squares == pytest.approx((change**2).sum(), rel=1e-9)
