"""Tallies of every loop to six digits, where terms cancel too."""

from __future__ import annotations

import numpy as np
import pytest
from arithmetic.cases import HALF, LOOPS, TAKEN, Case, exact_chain, forced, values_of, window

from loraformat import arithmetic
from loraformat.arithmetic import TILE, Tally
from loraformat.model.tensors import DType

SIX_DIGITS = 2e-7  # the figure of six digits that is printed is the same, but for one next to a middle


def exact_update(case: Case) -> np.ndarray:
    """Chains by rationals."""
    return np.array([[exact_chain(row, column) for column in case.right.T] for row in case.left])


def summed(case: Case, written: np.ndarray, update: np.ndarray) -> list[Tally]:
    """The tallies of what was written, in float64."""
    change = values_of(written, case.out) - values_of(case.bits, case.dtype)
    found = []
    for low in range(0, len(change), TILE):
        c, d = change[low : low + TILE], update[low : low + TILE]
        kept, whole = float((c * d).sum()), float((d * d).sum())
        found.append(Tally(kept, whole, int((c == 0).sum()), c.size, float(np.abs(d).max())))
    return found


def assert_same_digits(case: Case) -> None:
    figures, update = set(), exact_update(case)
    for loop in LOOPS:
        written, tallies = window(case, loop)
        for found, wanted in zip(tallies, summed(case, written, update), strict=True):
            assert (found.unchanged, found.numel) == (wanted.unchanged, wanted.numel)
            assert found.whole == pytest.approx(wanted.whole, rel=SIX_DIGITS, abs=0), loop
            assert found.kept == pytest.approx(wanted.kept, rel=SIX_DIGITS, abs=0), loop
            assert found.largest == pytest.approx(wanted.largest, rel=SIX_DIGITS, abs=0), loop
        if loop != "numpy":
            figures.add(repr(tallies))
    assert len(figures) <= 1


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("scale", [0.02, 1.3e-7])
def test_updates_that_cancel(dtype: DType, rank: int, rest: float, scale: float) -> None:
    """One adapter at a strength of 1 and at almost -1: what is left over is far below the errors of float32."""
    rng = np.random.default_rng(rank)
    rows, cols = 21, 20
    left, right = rng.standard_normal((rows, rank)) * scale, rng.standard_normal((rank, cols))
    bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)) * 0.02, dtype)
    pair = np.concatenate([left, left * (rest - 1)], axis=1), np.concatenate([right, right])
    assert_same_digits(Case(bits, dtype, dtype, *pair))


@pytest.mark.parametrize("dtype", HALF)
def test_updates_that_cancel_exactly_keep_nothing(dtype: DType) -> None:
    """No value changes, and so the share that is kept is zero: with every loop."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((TILE, 16)), rng.standard_normal((16, 300))
    bits = arithmetic.rounded_bits(rng.standard_normal((TILE, 300)) + 2.0, dtype)
    for loop in LOOPS:
        case = Case(bits, dtype, dtype, np.concatenate([left, -left], axis=1), np.concatenate([right, right]))
        written, (tally,) = window(case, loop)
        with forced(loop):
            update = arithmetic.multiply(case.left, case.right)
        assert tally.whole == pytest.approx(float((update * update).sum()), rel=SIX_DIGITS, abs=0)
        changed = written != bits
        assert tally.unchanged == bits.size - changed.sum()
        assert abs(tally.kept) <= 1e-6 * np.abs(update).max() * changed.sum()


@pytest.mark.parametrize("size", [1e38, 0.02, 1e-20])
@pytest.mark.parametrize("update", [1.0, 1e-3, 1e-20, 1e-28])
def test_a_base_that_is_rounded_as_well(size: float, update: float) -> None:
    """What rounding does to float32 values of W is of either sign, so that terms of `kept` cancel."""
    rng = np.random.default_rng(3)
    rows, cols, rank = TILE, 24, 4
    bits = arithmetic.rounded_bits(rng.uniform(-1, 1, (rows, cols)) * size, DType.F32)
    left, right = rng.standard_normal((rows, rank)) * update, rng.standard_normal((rank, cols))
    case = Case(bits, DType.F32, DType.BF16, left, right)
    exact = exact_update(case)
    for loop in LOOPS:
        written, (found,) = window(case, loop)
        (wanted,) = summed(case, written, exact)
        change = values_of(written, DType.BF16) - values_of(bits, DType.F32)
        assert found.unchanged == wanted.unchanged
        assert found.whole == pytest.approx(wanted.whole, rel=SIX_DIGITS, abs=0)
        # Exact sums of the terms may be zero: the error is that of float64 sums.
        sizes = float(np.abs(change * (left @ right)).sum())
        assert found.kept == pytest.approx(wanted.kept, rel=SIX_DIGITS, abs=1e-14 * sizes)


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "numpy"])
def test_the_largest_update_is_that_of_float64(loop: str) -> None:
    rng = np.random.default_rng(4)
    rows, cols, rank = 3 * TILE, 200, 24
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, cols))
    bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)), DType.BF16)
    _, tallies = window(Case(bits, DType.BF16, DType.BF16, left, right), loop)
    sizes = np.abs(left @ right)
    wanted = [sizes[low : low + TILE].max() for low in range(0, rows, TILE)]
    assert [tally.largest for tally in tallies] == pytest.approx(wanted, rel=1e-13)
