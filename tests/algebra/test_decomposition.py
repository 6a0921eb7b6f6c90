"""Decompositions against numpy's SVD of the whole matrix; the best factors, and what rounding adds to them."""

from __future__ import annotations

import numpy as np
import pytest

from loraformat.algebra.decomposition import decomposed, stored
from loraformat.algebra.factors import Product
from loraformat.model.tensors import DType

SHAPES = [(40, 30, 8), (30, 40, 8), (6, 50, 8), (50, 6, 8), (5, 4, 8), (64, 64, 1)]


def product(rows: int, cols: int, rank: int, seed: int = 0) -> Product:
    g = np.random.default_rng(seed)
    return Product(g.standard_normal((rows, rank)), g.standard_normal((rank, cols)))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_svd_of_the_whole_matrix(shape: tuple[int, int, int]) -> None:
    matrix = product(*shape)
    whole = matrix.left @ matrix.right
    found = decomposed(matrix)
    exact = np.linalg.svd(whole, compute_uv=False)
    assert found.rank == min(shape)
    assert found.values == pytest.approx(exact[: found.rank], rel=1e-10)
    assert found.left.T @ found.left == pytest.approx(np.eye(found.rank), abs=1e-12)
    assert found.right @ found.right.T == pytest.approx(np.eye(found.rank), abs=1e-12)
    assert found.left * found.values @ found.right == pytest.approx(whole, abs=1e-11)
    for rank in range(1, found.rank + 1):
        kept = found.factors(rank)
        error = np.linalg.norm(whole - kept.left @ kept.right)
        optimum = np.linalg.norm(exact[rank:])
        assert error <= optimum * (1 + 1e-9) + 1e-12 * found.norm
        assert found.tail(rank) == pytest.approx(optimum, rel=1e-9, abs=1e-12 * found.norm)
    assert found.norm == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    few = decomposed(matrix, 2)
    assert (few.values == found.values).all()
    assert few.factors(1).left == pytest.approx(found.factors(1).left, abs=1e-12)


def test_deficient_factors_have_the_rank_that_they_tell() -> None:
    matrix = product(30, 20, 5)
    doubled = Product(np.concatenate([matrix.left, matrix.left], 1), np.concatenate([matrix.right, 2 * matrix.right]))
    assert decomposed(doubled).rank == 5
    assert decomposed(Product(np.zeros((4, 2)), np.ones((2, 3)))).rank == 0
    assert decomposed(Product(np.zeros((4, 0)), np.zeros((0, 3)))).norm == 0


@pytest.mark.parametrize("factor", [1e-150, 1e-22, 1e21, 1e150])
def test_lopsided_factors_neither_overflow_nor_vanish(factor: float) -> None:
    matrix = product(12, 9, 4)
    plain, lopsided = decomposed(matrix), decomposed(Product(matrix.left * factor, matrix.right / factor))
    assert lopsided.values == pytest.approx(plain.values, rel=1e-10)


def test_signs_are_fixed_and_both_factors_have_the_roots() -> None:
    matrix = product(12, 9, 4)
    kept = decomposed(matrix).factors(3)
    largest = np.abs(kept.left).argmax(axis=0)
    assert (kept.left[largest, range(3)] > 0).all()
    assert np.linalg.norm(kept.left, axis=0) == pytest.approx(np.linalg.norm(kept.right, axis=1))
    turned = decomposed(Product(-matrix.left, -matrix.right)).factors(3)
    assert turned.left == pytest.approx(kept.left, abs=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(DType.F32, 2.0**-22), (DType.F16, 2.0**-9), (DType.BF16, 2.0**-6.4)])
def test_what_rounding_adds_is_told_exactly(dtype: DType, most: float) -> None:
    matrix = decomposed(product(60, 50, 6)).factors(6)
    whole = matrix.left @ matrix.right
    written, change = stored(matrix, dtype)
    exact = np.linalg.norm(whole - written.left @ written.right)
    assert change == pytest.approx(exact, rel=1e-5)
    assert 0 < change <= most * np.linalg.norm(whole)
