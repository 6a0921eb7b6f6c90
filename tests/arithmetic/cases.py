"""Windows to compute, and what exact rational arithmetic makes of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from loraformat import arithmetic
from loraformat.arithmetic import compiled
from loraformat.model.tensors import DType

HALF = (DType.BF16, DType.F16)
TAKEN = (*HALF, DType.F32)
LOOPS = (*compiled._kernels(), "numpy")
UNSIGNED = {DType.BF16: np.uint16, DType.F16: np.uint16, DType.F32: np.uint32, DType.F64: np.uint64}
# (bits of the significand, exponent of the smallest normal number) by IEEE 754 and for bfloat16.
SHAPE = {DType.BF16: (8, -126), DType.F16: (11, -14), DType.F32: (24, -126), DType.F64: (53, -1022)}


@dataclass(frozen=True)
class Case:
    """W as bits of its dtype, (rows, cols), and the factors."""

    bits: np.ndarray
    dtype: DType
    out: DType
    left: np.ndarray
    right: np.ndarray


@contextmanager
def forced(loop: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {compiled.VARIABLE: loop}):
        assert arithmetic.loop() == loop
        yield


def window(case: Case, loop: str) -> tuple[np.ndarray, list[arithmetic.Tally]]:
    """The bits that a loop writes, and its tallies."""
    rows, cols = case.bits.shape
    written = np.full((rows, cols), 0x5A5A, UNSIGNED[case.out])
    packed = arithmetic.pack(case.left, case.right)
    with forced(loop):
        tallies = arithmetic.window(packed, 0, rows, memory(case.bits), case.dtype, memory(written), case.out)
    return written, tallies


def memory(bits: np.ndarray) -> memoryview:
    return bits.reshape(-1).view(np.uint8).data


def values_of(bits: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if dtype is DType.BF16:
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        types = {DType.F16: np.float16, DType.F32: np.float32, DType.F64: np.float64}
        return bits.view(types[dtype]).astype(np.float64)


def exact_bits(value: float, dtype: DType) -> int:
    """`value` in a dtype, to the nearest, ties to even; NaN is the quiet one without a payload."""
    precision, least = SHAPE[dtype]
    size = UNSIGNED[dtype]().itemsize * 8
    infinity = ((1 << (size - precision)) - 1) << (precision - 1)
    if math.isnan(value):
        return infinity | 1 << (precision - 2)
    sign = (1 << (size - 1)) if math.copysign(1, value) < 0 else 0
    if math.isinf(value):
        return sign | infinity
    exponent = max(math.frexp(value)[1] - 1, least) if value else least
    units = round(abs(Fraction(value)) / Fraction(2) ** (exponent - precision + 1))
    # Bits of a float are ordered as its size is, so a carry into the next power of two is right by itself.
    return sign | min(units + ((exponent - least) << (precision - 1)), infinity)


def exact_chain(left: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        total = rounded_sum(Fraction(one) * Fraction(other), total)
    return total


def rounded_sum(product: Fraction, total: float) -> float:
    """`product` + `total` in float64; the sign of a zero is not looked at."""
    if not math.isfinite(total):
        return total
    try:
        return float(product + Fraction(total))
    except OverflowError:
        return math.inf if product > 0 else -math.inf


def exact_window(case: Case) -> np.ndarray:
    """The right bits: float64 chains by rationals, one addition, one rounding; W's own where nothing changes."""
    base = values_of(case.bits, case.dtype)
    found = np.empty(case.bits.shape, UNSIGNED[case.out])
    for row, col in np.ndindex(*case.bits.shape):
        update = exact_chain(case.left[row], case.right[:, col])
        value = float(base[row, col])
        if case.dtype is case.out and (update == 0 or math.isnan(value)):
            found[row, col] = case.bits[row, col]
        else:
            found[row, col] = exact_bits(value + update, case.out)
    return found


@st.composite
def cases(draw: st.DrawFn, *, most_rows: int = 20, most_cols: int = 40, ranks: st.SearchStrategy[int]) -> Case:
    """Windows of every kind: of left-over rows and columns, and of values that are hard for each of the bounds."""
    rows, cols, rank = draw(st.integers(1, most_rows)), draw(st.integers(1, most_cols)), draw(ranks)
    dtype, out = draw(st.sampled_from(TAKEN)), draw(st.sampled_from(TAKEN))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bits = _base(rng, draw(st.sampled_from(["usual", "any bits", "zeros", "tiny", "large"])), dtype, rows, cols)
    kind = draw(st.sampled_from(["usual", "scaled", "lopsided", "cancels", "zeros", "extreme", "middle", "sparse"]))
    left, right = factors(rng, kind, rows, cols, rank, values_of(bits, dtype), out)
    return Case(bits, dtype, out, left, right)


def _base(rng: np.random.Generator, kind: str, dtype: DType, rows: int, cols: int) -> np.ndarray:
    if kind == "any bits":
        return rng.integers(0, 1 << (8 * dtype.itemsize), (rows, cols), UNSIGNED[dtype])
    size = {"usual": 0.02, "zeros": 0.0, "tiny": 2.0**-18, "large": 2.0**14}[kind]
    values = rng.standard_normal((rows, cols)) * size
    values[rng.random((rows, cols)) < 0.1] = -0.0
    return arithmetic.rounded_bits(values, dtype)


def factors(
    rng: np.random.Generator, kind: str, rows: int, cols: int, rank: int, base: np.ndarray, out: DType
) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) that are hard in one way."""
    left = rng.standard_normal((rows, rank)) * 2.0 ** rng.integers(-12, 3)
    right = rng.standard_normal((rank, cols)).astype(np.float32).astype(np.float64)
    if kind == "usual":
        return left.astype(np.float32).astype(np.float64), right
    if kind == "lopsided":
        left *= 2.0 ** rng.integers(-40, 40, (rows, 1))
        return left, right * 2.0 ** rng.integers(-40, 10, (rank, 1))
    if kind == "cancels" and rank > 1:
        half = rank // 2
        left[:, half : 2 * half] = -left[:, :half] * (1 + 2.0**-30 * rng.integers(0, 2, (rows, 1)))
        right[half : 2 * half] = right[:half]
    if kind == "zeros":
        left[rng.random(rows) < 0.5] = 0
        right[:, rng.random(cols) < 0.5] = 0
    if kind == "sparse":
        left[rng.random(left.shape) < 0.7] = 0
        right[rng.random(right.shape) < 0.7] = -0.0
    if kind == "extreme":
        left *= 2.0 ** rng.choice([-1000.0, -500, -140, 100, 500])
        right *= 2.0 ** rng.choice([-500.0, -140, 0, 100])
    if kind == "middle" and rank > 1:
        # W in the first row lies half a unit of the output, and a trifle, below the middle.
        with np.errstate(all="ignore"):
            sizes = np.where(np.isfinite(base[0]) & (base[0] != 0), np.abs(base[0]), 1.0)
        units = 2.0 ** (np.floor(np.log2(sizes)) - SHAPE[out][0])
        left[:], right[:] = 0, rng.standard_normal((rank, cols)) * 2.0**-20
        left[:, 0], right[0] = 1, units
        left[:, 1], right[1] = 2.0 ** -rng.integers(20, 60), units * rng.choice([-1.0, 0.0, 1.0], cols)
    return left, right
