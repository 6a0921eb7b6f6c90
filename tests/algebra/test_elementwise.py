"""Methods value by value against PEFT's own functions and plain definitions, whatever the blocks are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from loraformat.algebra import elementwise, row_blocks
from loraformat.algebra.counted_random import key_of, uniform
from loraformat.algebra.elementwise import RANDOM, TRIMMED, Sparsity, combined
from loraformat.algebra.factors import Product
from loraformat.algebra.row_blocks import held

METHODS = (*TRIMMED, *RANDOM)
WEIGHTS = [0.7, -0.4, 1.3]


def changes(rows: int = 70, cols: int = 33, count: int = 3) -> list[Product]:
    g = np.random.default_rng(5)
    return [Product(g.standard_normal((rows, 4)), g.standard_normal((4, cols))) for _ in range(count)]


def dense(terms: list[Product]) -> list[torch.Tensor]:
    return [torch.from_numpy(held(combined([term], [1.0], Sparsity(method="magnitude"), "")).values) for term in terms]


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.99, 1.0])
def test_ties_is_that_of_peft(sign: str, density: float) -> None:
    terms = changes()
    found = held(combined(terms, WEIGHTS, Sparsity(method="ties", density=density, sign=sign), "w")).values
    exact = [merge_utils.prune(each, density, "magnitude") if density < 1 else each for each in dense(terms)]
    mask = merge_utils.calculate_majority_sign_mask(torch.stack(exact), method=sign)
    weighted = torch.stack(exact) * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    assert found == pytest.approx(merge_utils.disjoint_merge(weighted, mask).numpy(), abs=1e-14)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.99])
def test_magnitude_is_that_of_peft(density: float) -> None:
    terms = changes()
    found = held(combined(terms, WEIGHTS, Sparsity(method="magnitude", density=density), "w")).values
    exact = merge_utils.magnitude_prune(dense(terms), torch.tensor(WEIGHTS, dtype=torch.float64), density)
    assert found == pytest.approx(exact.numpy(), abs=1e-14)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 5e-324, -1e300, 3.5]), min_size=12, max_size=12),
    share=st.floats(0.01, 1.0),
)
def test_of_equal_magnitudes_the_first_stay(values: list[float], share: float) -> None:
    matrix = np.array(values).reshape(4, 3)
    count = int(share * 12)
    found = held(combined([matrix], [1.0], Sparsity(method="magnitude", density=share), "w")).values.reshape(-1)
    order = sorted(range(12), key=lambda at: (-abs(values[at]), at))[:count]
    exact = np.array([values[at] if at in order else 0.0 for at in range(12)])
    assert (found == exact).all()


def test_breadcrumbs_drop_both_ends() -> None:
    matrix = np.arange(1.0, 101.0).reshape(10, 10)
    found = held(combined([matrix], [1.0], Sparsity(method="breadcrumbs", density=0.5, gamma=0.1), "w")).values
    assert sorted(found[found > 0]) == list(range(41, 91))
    found = held(combined([matrix], [1.0], Sparsity(method="breadcrumbs", density=0.95, gamma=0.1), "w")).values
    assert sorted(found[found > 0]) == list(range(1, 96))


def test_dare_keeps_what_it_says_and_the_mean() -> None:
    matrix = np.ones((400, 300))
    found = held(combined([matrix], [1.0], Sparsity(method="dare", density=0.3, seed=1), "w")).values
    kept = found != 0
    assert found[kept] == pytest.approx(1 / 0.3)
    assert kept.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / kept.size))


def test_della_keeps_large_values_of_a_row_more_often() -> None:
    g = np.random.default_rng(2)
    matrix = g.standard_normal((3000, 20))
    sparsity = Sparsity(method="della", density=0.5, epsilon=0.3, seed=1)
    found = held(combined([matrix], [1.0], sparsity, "w")).values
    ranks = np.abs(matrix).argsort(axis=1).argsort(axis=1)
    for rank in range(20):
        chance = 0.2 + 0.6 * rank / 19
        kept = found[ranks == rank] != 0
        assert kept.mean() == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / 3000))
        values = matrix[ranks == rank]
        assert found[ranks == rank][kept] == pytest.approx(values[kept] / chance)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_do_not_change_a_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = Sparsity(method=method, density=0.4, gamma=0.05, epsilon=0.2, seed=9)
    terms = [*changes(count=2), np.round(changes(count=1)[0].left @ changes(count=1)[0].right)]
    whole = held(combined(terms, WEIGHTS, sparsity, "w")).values
    monkeypatch.setattr(row_blocks, "HEIGHT", 7)
    assert (held(combined(terms, WEIGHTS, sparsity, "w")).values == whole).all()


@pytest.mark.parametrize("method", RANDOM)
def test_random_numbers_belong_to_seed_weight_and_adapter(method: str) -> None:
    def found(seed: int, name: str) -> bytes:
        sparsity = Sparsity(method=method, density=0.5, epsilon=0.2, seed=seed)
        return held(combined(changes(), WEIGHTS, sparsity, name)).values.tobytes()

    assert found(1, "a") == found(1, "a")
    assert len({found(1, "a"), found(2, "a"), found(1, "b")}) == 3
    same = [changes(count=1)[0]] * 2
    sparse = [
        elementwise._sparse(change, 0, 70, Sparsity(method="dare", density=0.5))
        for change in combined(same, [1.0, 1.0], Sparsity(method="dare", density=0.5), "w").changes
    ]
    assert not np.array_equal(*sparse)


def test_conflicts_are_counted() -> None:
    terms = [np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([[-1.0, 1.0, 1.0, 0.0]])]
    found = combined(terms, [1.0, 1.0], Sparsity(method="ties"), "w")
    held(found)
    assert (found.tally.there, found.tally.opposed) == (3, 1)


def test_uniform_numbers_are_uniform() -> None:
    found = uniform(key_of(3, "x"), 0, 100_000)
    assert 0 <= found.min() < found.max() < 1
    counts = np.histogram(found, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 60  # chi-square of 19 degrees: 1e-5 above 58
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
