"""Sums in a fixed order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from loraformat.arithmetic import column_squares, fold, row_squares


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 63, 64, 65, 1000])
def test_sums_are_near_the_exact_ones(length: int) -> None:
    """rtol: ten additions one on top of the other at most, of terms of one sign."""
    matrix = np.random.default_rng(length).standard_normal((length, 7))
    exact = [float(sum(Fraction(value) ** 2 for value in column)) for column in matrix.T.tolist()]
    np.testing.assert_allclose(column_squares(matrix), exact, rtol=20 * 2.0**-53)
    np.testing.assert_allclose(row_squares(matrix.T), exact, rtol=20 * 2.0**-53)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 1023])
def test_the_order_depends_on_nothing_but_the_length(length: int) -> None:
    """Not on the layout in memory, which numpy's own sums follow, nor on the other sums that are made at a time."""
    values = np.random.default_rng(length).standard_normal((length, 9))
    wanted = fold(values, 0)
    np.testing.assert_array_equal(fold(np.asfortranarray(values), 0), wanted)
    np.testing.assert_array_equal(fold(np.ascontiguousarray(values.T), 1), wanted)
    np.testing.assert_array_equal(fold(values[:, 4:5], 0), wanted[4:5])
    np.testing.assert_array_equal(fold(values[:, ::-1], 0), wanted[::-1])


def test_values_are_not_changed() -> None:
    for length in (1, 5):
        values = np.ones((length, 2))
        fold(values, 0)[:] = 7
        assert (values == 1).all()
