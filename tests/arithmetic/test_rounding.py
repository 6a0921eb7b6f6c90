"""float64 to narrower dtypes: one rounding, against rationals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arithmetic.cases import SHAPE, UNSIGNED, exact_bits, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat import arithmetic
from loraformat.model.tensors import DType

DTYPES = list(SHAPE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_value(dtype: DType) -> None:
    narrow = st.floats(width=32, allow_nan=False) if dtype is not DType.F64 else st.floats()

    @settings(max_examples=400, deadline=None)
    @given(st.one_of(st.floats(), narrow), st.integers(-3, 3))
    def check(value: float, steps: int) -> None:
        for _ in range(abs(steps)):
            value = math.nextafter(value, math.copysign(math.inf, steps))
        assert int(arithmetic.rounded_bits(np.array([value]), dtype)[0]) == exact_bits(value, dtype)

    check()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_middle_and_what_is_beside_it(dtype: DType) -> None:
    """All numbers of 16 bits, subnormal and the largest too."""
    numbers = np.arange(0, exact_bits(math.inf, dtype), dtype=UNSIGNED[dtype])
    values = values_of(numbers, dtype)
    middles = values + np.diff(values, append=values[-1] + (values[-1] - values[-2])) / 2
    below, above = np.nextafter(middles, 0), np.nextafter(middles, np.inf)
    np.testing.assert_array_equal(arithmetic.rounded_bits(values, dtype), numbers)
    np.testing.assert_array_equal(arithmetic.rounded_bits(below, dtype), numbers)
    np.testing.assert_array_equal(arithmetic.rounded_bits(above, dtype), numbers + 1)
    np.testing.assert_array_equal(arithmetic.rounded_bits(middles, dtype), numbers + numbers % 2)
    np.testing.assert_array_equal(arithmetic.rounded_bits(-below, dtype), numbers | 0x8000)
