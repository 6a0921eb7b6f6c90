"""KnOTS and the core space: exact where nothing is dropped, and independent of how updates are split into factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loraformat.algebra.elementwise import Sparsity
from loraformat.algebra.factors import Product
from loraformat.algebra.shared_bases import core, knots

METHODS = [knots, core]


def changes(rows: int = 40, cols: int = 30) -> list[Product]:
    g = np.random.default_rng(4)
    return [Product(g.standard_normal((rows, rank)), g.standard_normal((rank, cols))) for rank in (4, 3, 5)]


def dense(found: Product) -> Any:
    return found.left @ found.right


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_sum_in_the_basis_is_the_sum(method: Callable[..., Any]) -> None:
    terms, weights = changes(), [0.5, -1.0, 2.0]
    found, _ = method(terms, weights, Sparsity(method="magnitude"), "w")
    exact = sum(weight * dense(term) for weight, term in zip(weights, terms, strict=True))
    assert dense(found) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_how_an_update_is_split_does_not_matter(method: Callable[..., Any]) -> None:
    terms = changes()
    sparsity = Sparsity(method="ties", density=0.5)
    g = np.random.default_rng(8)
    mixes = [g.standard_normal((term.left.shape[1],) * 2) for term in terms]
    split = [Product(term.left @ mix, np.linalg.solve(mix, term.right)) for term, mix in zip(terms, mixes, strict=True)]
    one, other = (dense(method(each, [1.0] * 3, sparsity, "w")[0]) for each in (terms, split))
    assert one == pytest.approx(other, abs=1e-10)
    assert np.linalg.matrix_rank(one) <= 12


def test_knots_is_ties_of_the_right_singular_vectors() -> None:
    from loraformat.algebra.elementwise import combined
    from loraformat.algebra.row_blocks import held

    terms = changes()
    sparsity = Sparsity(method="ties", density=0.6)
    left, values, right = np.linalg.svd(np.concatenate([dense(term) for term in terms], axis=1), full_matrices=False)
    left, values, right = left[:, :12], values[:12], right[:12]
    parts = np.split(values[:, None] * right, 3, axis=1)
    exact = left @ held(combined(parts, [1.0] * 3, sparsity, "w")).values
    assert dense(knots(terms, [1.0] * 3, sparsity, "w")[0]) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 30), (30, 5)])
def test_more_ranks_than_rows(method: Callable[..., Any], shape: tuple[int, int]) -> None:
    terms = changes(*shape)
    found, _ = method(terms, [1.0] * 3, Sparsity(method="magnitude"), "w")
    assert dense(found) == pytest.approx(sum(map(dense, terms)), abs=1e-12)
