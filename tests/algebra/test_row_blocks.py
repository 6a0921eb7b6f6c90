"""Leading singular values by blocks of rows against the full decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from loraformat.algebra import row_blocks
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import InMemory, leading

SPECTRA = {
    "slow": lambda i: i**-0.25,
    "half": lambda i: i**-0.5,
    "inverse": lambda i: 1.0 / i,
    "steep": lambda i: i**-2.0,
    "exponential": lambda i: np.exp(-i / 40),
    "flat": np.ones_like,
    "low rank and noise": lambda i: np.where(i <= 20, 1.0, 0.01),
    "low rank in noise": lambda i: np.where(i <= 20, 1.0, 0.3),
}


def matrix(name: str, rows: int = 700, cols: int = 560) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(1)
    values = SPECTRA[name](np.arange(1.0, cols + 1))
    left = np.linalg.qr(g.standard_normal((rows, cols)))[0]
    right = np.linalg.qr(g.standard_normal((cols, cols)))[0]
    return left * values @ right, values


@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_near_the_optimum_and_says_how_far_it_is(name: str) -> None:
    whole, values = matrix(name)
    found = leading(InMemory(whole), RankRule(rank=16))
    assert found.residual > 0
    kept = found.factors(16)
    error = np.linalg.norm(whole - kept.left @ kept.right)
    optimum = np.sqrt((values[16:] ** 2).sum())
    assert optimum * (1 - 1e-9) <= error <= optimum * 1.002
    assert found.tail(16) == pytest.approx(error, rel=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(whole), rel=1e-12)


@pytest.mark.parametrize("name", ["steep", "exponential", "low rank and noise"])
def test_a_bound_finds_its_rank(name: str) -> None:
    whole, values = matrix(name)
    rule = RankRule(error=0.3)
    wanted = next(k for k in range(1, 561) if (values[k:] ** 2).sum() <= 0.09 * (values**2).sum())
    assert rule.least(leading(InMemory(whole), rule)) == pytest.approx(wanted, abs=1)


def test_a_bound_beyond_a_quarter_is_exact() -> None:
    whole, values = matrix("flat")
    found = leading(InMemory(whole), RankRule(energy=0.9))
    assert found.residual == 0
    assert found.rank == len(values)


def test_what_is_not_held_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = matrix("inverse")

    class Computed:
        shape = (whole.shape[0], whole.shape[1])

        def block(self, start: int, stop: int) -> np.ndarray:
            return whole[start:stop] * 1.0

    rule = RankRule(rank=8)
    before = leading(Computed(), rule).factors(8)
    monkeypatch.setattr(row_blocks, "_HELD_NBYTES", 0)
    after = leading(Computed(), rule).factors(8)
    assert before.left.tobytes() == after.left.tobytes()
    assert before.right.tobytes() == after.right.tobytes()
