"""Linear equations against exact fractions and LAPACK; orthonormal columns against LAPACK, signs included."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from loraformat.arithmetic.functions.factorizations import orthonormal, solved

RANDOM = np.random.default_rng(0)


def exactly_solved(left: list[list[int]], right: list[list[int]]) -> list[list[Fraction]]:
    rows = [[Fraction(x) for x in (*one, *other)] for one, other in zip(left, right, strict=True)]
    for k in range(len(rows)):
        pivot = next(n for n in range(k, len(rows)) if rows[n][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for n, row in enumerate(rows):
            if n != k:
                rows[n] = [value - row[k] * of for value, of in zip(row, rows[k], strict=True)]
    return [row[len(rows) :] for row in rows]


def test_solutions_of_integer_equations_are_those_of_fractions() -> None:
    for size in (1, 2, 3, 5):
        left = RANDOM.integers(-9, 10, (4, size, size)) + 20 * np.roll(np.eye(size, dtype=int), 1, axis=0)
        right = RANDOM.integers(-9, 10, (4, size, 2))
        found = solved(left.astype(float), right.astype(float))
        for number in range(4):
            true = np.array(exactly_solved(left[number].tolist(), right[number].tolist()), float)
            # well conditioned: sixteen digits less the few that elimination of five rows loses
            np.testing.assert_allclose(found[number], true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 100])
def test_the_cayley_transform_is_that_of_lapack_and_orthogonal(size: int) -> None:
    skew = RANDOM.normal(size=(3, size, size))
    skew = skew - skew.transpose(0, 2, 1)
    unit = np.eye(size)
    found = solved(unit + skew, unit - skew)
    wanted = torch.linalg.solve(torch.from_numpy(unit + skew), torch.from_numpy(unit - skew))
    # values of at most 1; errors grow with the size of S, about 2 sqrt(size)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-13 * size)
    np.testing.assert_allclose(found @ found.transpose(0, 2, 1), np.broadcast_to(unit, found.shape), atol=1e-13 * size)


def test_a_pivot_of_zero_is_exchanged_and_a_singular_matrix_shows() -> None:
    assert np.array_equal(solved(np.array([[[0.0, 1], [1, 0]]]), np.array([[[5.0], [7]]])), [[[7], [5]]])
    assert not np.isfinite(solved(np.zeros((1, 2, 2)), np.ones((1, 2, 1)))).any()
    spoiled = np.eye(40)[None].copy()
    spoiled[0, 3, 5] = np.nan
    assert np.isnan(solved(spoiled, np.ones((1, 40, 1)))[0, 3]).all()


def test_matrices_of_a_stack_do_not_depend_on_each_other_nor_on_the_layout() -> None:
    left, right = RANDOM.normal(size=(3, 50, 50)), RANDOM.normal(size=(3, 50, 4))
    whole = solved(left, right)
    for number in range(3):
        one = slice(number, number + 1)
        assert solved(left[one], right[one]).tobytes() == whole[one].tobytes()
    turned = np.ascontiguousarray(left.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert solved(turned, np.asfortranarray(right)).tobytes() == whole.tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (5, 5), (100, 8), (300, 33)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_columns_are_those_of_lapack(shape: tuple[int, int], dtype: str) -> None:
    columns = RANDOM.normal(size=shape).astype(dtype)
    found = orthonormal(columns)
    assert found.dtype == columns.dtype
    wanted = torch.linalg.qr(torch.from_numpy(columns)).Q.numpy()
    # some units of values up to 1, times how much the columns resemble each other
    np.testing.assert_allclose(found, wanted, atol=1e-13 if dtype == "float64" else 2e-5)


def test_columns_that_need_no_reflection() -> None:
    columns = np.array([[2.0, 1], [0, -3], [0, 0]])
    np.testing.assert_array_equal(orthonormal(columns), torch.linalg.qr(torch.from_numpy(columns)).Q.numpy())
    np.testing.assert_array_equal(orthonormal(np.zeros((3, 2))), np.eye(3, 2))
    given = columns.copy()
    orthonormal(given)
    np.testing.assert_array_equal(given, columns)


def test_columns_do_not_depend_on_the_layout() -> None:
    columns = RANDOM.normal(size=(77, 9))
    assert orthonormal(np.asfortranarray(columns)).tobytes() == orthonormal(columns).tobytes()
