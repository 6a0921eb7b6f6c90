"""Every loop gives the same bytes, and they are those of rational arithmetic."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
from arithmetic.cases import (
    HALF,
    LOOPS,
    SHAPE,
    TAKEN,
    UNSIGNED,
    Case,
    cases,
    exact_chain,
    exact_window,
    factors,
    forced,
    memory,
    values_of,
    window,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat import arithmetic
from loraformat.arithmetic import TILE, Tally
from loraformat.model.tensors import DType


def same(found: list[Tally], wanted: list[Tally]) -> bool:
    """Counts are equal, and of the sums six digits, against the size of what is summed."""
    if len(found) != len(wanted):
        return False
    for one, other in zip(found, wanted, strict=True):
        if (one.unchanged, one.numel) != (other.unchanged, other.numel):
            return False
        if math.isfinite(other.kept) != math.isfinite(one.kept):
            return False
    return True


@settings(max_examples=250, deadline=None)
@given(cases(most_rows=7, most_cols=21, ranks=st.integers(0, 9)))
def test_bits_are_those_of_rationals(case: Case) -> None:
    wanted = exact_window(case)
    for loop in LOOPS:
        found, _ = window(case, loop)
        np.testing.assert_array_equal(found, wanted, err_msg=loop)


@settings(max_examples=250, deadline=None)
@given(
    cases(most_rows=TILE + 5, most_cols=70, ranks=st.one_of(st.integers(0, 20), st.sampled_from([33, 64, 100, 256])))
)
def test_bits_and_counts_do_not_depend_on_the_loop(case: Case) -> None:
    wanted, tallies = window(case, LOOPS[0])
    for loop in LOOPS[1:]:
        found, others = window(case, loop)
        np.testing.assert_array_equal(found, wanted, err_msg=loop)
        assert same(others, tallies)
        if loop != "numpy":
            assert repr(others) == repr(tallies)  # NaN is equal here


@settings(max_examples=100, deadline=None)
@given(cases(most_rows=TILE + 5, most_cols=70, ranks=st.integers(0, 40)))
def test_a_window_is_the_product_finished(case: Case) -> None:
    """float32 first shows in no bit: `finish` rounds what float64 chains gave."""
    rows, cols = case.bits.shape
    with forced(LOOPS[0]):
        update = arithmetic.product(arithmetic.pack(case.left, case.right), 0, rows)
        written = np.zeros((rows, cols), UNSIGNED[case.out])
        with np.errstate(all="ignore"):
            result = values_of(case.bits, case.dtype) + update
        arithmetic.finish(memory(case.bits), case.dtype, result, update, memory(written), case.out)
    np.testing.assert_array_equal(written, window(case, LOOPS[0])[0])


@pytest.mark.parametrize("kind", ["usual", "scaled", "lopsided", "cancels", "middle", "extreme"])
@pytest.mark.parametrize("rank", [3, 24])
def test_products_do_not_depend_on_the_loop(kind: str, rank: int) -> None:
    rng = np.random.default_rng(rank)
    left, right = factors(rng, kind, 19, 37, rank, rng.standard_normal((19, 37)), DType.BF16)
    results = []
    for loop in LOOPS:
        with forced(loop):
            results.append(arithmetic.multiply(left, right))
    wanted = np.array([[exact_chain(row, column) for column in right.T] for row in left])
    for found in results:
        np.testing.assert_array_equal(found, wanted)


def test_stacks_are_multiplied_one_by_one() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((3, 5, 7)), rng.standard_normal((3, 7, 4))
    for loop in LOOPS:
        with forced(loop):
            found = arithmetic.multiply(left, right)
            for number in range(3):
                np.testing.assert_array_equal(found[number], arithmetic.multiply(left[number], right[number]))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", HALF)
def test_rows_do_not_depend_on_the_window(loop: str, dtype: DType) -> None:
    rng = np.random.default_rng(1)
    rows, cols = 3 * TILE + 9, 50
    bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)), dtype)
    packed = arithmetic.pack(rng.standard_normal((rows, 6)), rng.standard_normal((6, cols)))
    whole, tallies = window(Case(bits, dtype, dtype, packed.left, packed.right_matrix()), loop)
    part = np.zeros((rows - TILE, cols), np.uint16)
    with forced(loop):
        again = arithmetic.window(packed, TILE, rows, memory(bits[TILE:]), dtype, memory(part), dtype)
        update = arithmetic.product(packed, TILE + 3, rows - 1)
        np.testing.assert_array_equal(update, arithmetic.product(packed, 0, rows)[TILE + 3 : rows - 1])
    np.testing.assert_array_equal(part, whole[TILE:])
    assert again == tallies[1:]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 2 * TILE + 5),
    cols=st.integers(1, 300),
    rank=st.integers(1, 20),
    pair=st.tuples(st.sampled_from(TAKEN), st.sampled_from(TAKEN)),
    size=st.sampled_from([1e-4, 1e-2, 1.0]),
    loop=st.sampled_from(LOOPS),
)
def test_tallies_are_sums_of_what_was_written(
    rows: int, cols: int, rank: int, pair: tuple[DType, DType], size: float, loop: str
) -> None:
    rng = np.random.default_rng(rows * 1000 + cols)
    bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)) * 0.1, pair[0])
    left, right = rng.standard_normal((rows, rank)) * size, rng.standard_normal((rank, cols))
    written, tallies = window(Case(bits, *pair, left, right), loop)
    change, update = values_of(written, pair[1]) - values_of(bits, pair[0]), left @ right
    assert len(tallies) == -(-rows // TILE)
    for number, tally in enumerate(tallies):
        tile = slice(number * TILE, (number + 1) * TILE)
        c, d = change[tile], update[tile]
        # Six digits, counted against the sum of sizes: terms of both signs may cancel.
        assert tally.kept == pytest.approx(float((c * d).sum()), abs=5e-7 * float(np.abs(c * d).sum()))
        assert tally.whole == pytest.approx(float((d * d).sum()), rel=5e-7)
        assert tally.largest == pytest.approx(float(np.abs(d).max()), rel=5e-6)
        assert (tally.unchanged, tally.numel) == (int((c == 0).sum()), c.size)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [*TAKEN, DType.F64])
def test_finish_keeps_the_bits_where_nothing_changes(loop: str, dtype: DType) -> None:
    """-0, and NaN with all they carry, in a tile with values that do change."""
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 1 << 63, (TILE + 2, 19), np.uint64).astype(UNSIGNED[dtype])
    bits[0, 0] = 1 << (8 * dtype.itemsize - 1)
    nan = np.isnan(values_of(bits, dtype))
    bits[1, :3] = arithmetic.rounded_bits(np.array([math.nan]), dtype)[0] | 5
    nan[1, :3] = True
    update = np.where(rng.random(bits.shape) < 0.5, 0.0, 1.0)
    with np.errstate(all="ignore"):
        result = values_of(bits, dtype) + update
    written = np.zeros_like(bits)
    with forced(loop):
        arithmetic.finish(memory(bits), dtype, result, update, memory(written), dtype)
    kept = (update == 0) | nan
    np.testing.assert_array_equal(written[kept], bits[kept])
    np.testing.assert_array_equal(written[~kept], arithmetic.rounded_bits(result, dtype)[~kept])


@pytest.mark.parametrize("loop", LOOPS)
def test_a_value_that_is_not_finite_shows_in_its_tile(loop: str) -> None:
    bits = arithmetic.rounded_bits(np.full((2 * TILE, 20), 60000.0), DType.F16)
    left = np.zeros((2 * TILE, 1))
    left[TILE + 1] = 60000.0
    right = np.zeros((1, 20))
    right[0, 3] = 1
    written, tallies = window(Case(bits, DType.F16, DType.F16, left, right), loop)
    assert math.isfinite(tallies[0].kept)
    assert not math.isfinite(tallies[1].kept)
    assert np.isinf(values_of(written, DType.F16)).sum() == 1
    bits[TILE + 1, 3] = 0x7C00  # infinite already: no update can change it
    _, tallies = window(Case(bits, DType.F16, DType.F16, left, right), loop)
    assert math.isfinite(tallies[1].kept)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_sides_of_length_zero(loop: str, shape: tuple[int, int, int]) -> None:
    rows, cols, rank = shape
    bits = np.full((rows, cols), 0x8000, np.uint16)
    written, tallies = window(Case(bits, DType.BF16, DType.BF16, np.ones((rows, rank)), np.ones((rank, cols))), loop)
    np.testing.assert_array_equal(written, bits)
    assert sum((tally.numel for tally in tallies), 0) == rows * cols


def assert_right(case: Case) -> None:
    """Every loop against float64 chains, rounded."""
    update = np.array([[exact_chain(row, column) for column in case.right.T] for row in case.left])
    wanted = arithmetic.rounded_bits(values_of(case.bits, case.dtype) + update, case.out)
    for loop in LOOPS:
        np.testing.assert_array_equal(window(case, loop)[0], wanted, err_msg=loop)


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.parametrize("rank", [2, 16, 40])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("size", [2.0**-6, 1.0, 64.0, 2.0**30])
def test_values_next_to_the_middle(dtype: DType, rank: int, place: int, size: float) -> None:
    """One term of each sum brings it so near to the middle between two neighbors that float32 must err somewhere.

    And so must float64 in any other order of additions: with the largest terms it errs by more than float32 has digits.
    """
    rng = np.random.default_rng(rank)
    cols = 300
    bits = arithmetic.rounded_bits(rng.standard_normal((1, cols)), dtype)
    base = values_of(bits, dtype)
    left, right = rng.standard_normal((1, rank)), rng.standard_normal((rank, cols)) * size
    left[0, place], right[place] = 1, 0
    unit = 2.0 ** (np.floor(np.log2(np.abs(base))) - SHAPE[dtype][0] + 1)
    middle = base + unit * (rng.integers(-6, 6, cols) + 0.5)
    distance = size * rank * rng.choice([-1, 1], cols) * 2.0 ** -rng.uniform(18, 58, cols)
    right[place] = (middle - base - left @ right + distance)[0]
    assert_right(Case(bits, dtype, dtype, left, right))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_worst_errors_of_float32(dtype: DType, sign: int) -> None:
    """Fifteen terms below half a unit of the sum are lost one after the other, as many as the bound allows for."""
    rank, shifts = 16, np.repeat(np.arange(-12, 20), 16)  # a block is recomputed in part or as a whole
    left = np.full((1, rank), 2.0**-12)
    right = np.full((rank, len(shifts)), sign * 2.0**-12 * (1 - 2.0**-20))
    left[0, 0], right[0] = 1, 1 - shifts * 2.0**-23
    if sign < 0:  # what is taken away from a little more than 1 is lost likewise
        right[0] += 2.0**-20
    half = 2.0 ** -SHAPE[dtype][0]
    bits = arithmetic.rounded_bits(np.full((1, len(shifts)), half), dtype)
    assert_right(Case(bits, dtype, dtype, left, right))
    assert_right(Case(bits ^ 0x8000, dtype, dtype, -left, right))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("module", ["compiled", "factors", "products", "rounding", "sums", "tally", "chains"])
def test_examples_in_docstrings(module: str, loop: str) -> None:
    with forced(loop):
        done = doctest.testmod(importlib.import_module(f"loraformat.arithmetic.{module}"))
    assert done.attempted
    assert not done.failed
