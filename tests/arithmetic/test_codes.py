"""Codes of a few bits as numbers: every loop, every order and width, against each code by itself."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arithmetic.cases import LOOPS, TAKEN, UNSIGNED, forced, memory, values_of
from arithmetic.test_compiled import TYPES, can_build, driver  # noqa: F401 - the fixture
from hypothesis import given, settings
from hypothesis import strategies as st

import compile_loops
from loraformat import arithmetic
from loraformat.arithmetic import compiled
from loraformat.arithmetic.codes import ACROSS, HIGH_FIRST, LOW_FIRST, CodedRows, Codes, decode, packed
from loraformat.arithmetic.compiled import Kernel
from loraformat.model.tensors import DType

ORDERS = {LOW_FIRST: 0, HIGH_FIRST: 1, ACROSS: 2}
LAYOUTS = ["bytes", "words", "words apart"]
FACTOR = 0.75


def some_codes(rng: np.random.Generator, order: str, bits: int, rows: int, cols: int, layout: str) -> Codes:
    if order == ACROSS:
        rows = -(-rows // 8) * 8
        stored: Any = rng.integers(-(1 << 31), 1 << 31, (cols, rows // 8)).astype(np.int32)
    elif layout == "bytes":
        wide = rng.integers(0, 256, (rows, -(-cols * bits // 8) + 3)).astype(np.uint8)
        stored = wide[:, 1:-2]  # rows that lie apart, at any address
    else:
        shape = (rows, -(-cols * bits // 32))
        shape = shape[::-1] if layout == "words apart" else shape
        stored = rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32)
        stored = stored.T if layout == "words apart" else stored
    run, first = int(rng.choice([1, 3, 16, 32, 64, 200])), 0
    if rng.random() < 0.3:
        first = int(rng.integers(0, run))
    groups = max(1, -(-(first + cols) // run))
    table = rng.standard_normal(1 << bits).astype(np.float32)
    table[rng.integers(0, len(table))] = rng.choice([-0.0, np.nan, np.inf])
    index = rng.integers(0, groups, cols).astype(np.int32) if order != ACROSS and rng.random() < 0.3 else None
    zeros = None
    if rng.random() < 0.5:
        table, zeros = np.arange(1 << bits, dtype=np.float32), rng.integers(0, 9, (rows, groups)).astype(np.float32)
    scales = (rng.standard_normal((rows, groups)) * 0.01).astype(np.float32)
    return Codes(
        packed=stored, cols=cols, bits=bits, order=order, table=table, scales=scales, run=run, first=first, index=index,
        zeros=zeros, factor=FACTOR,
    )  # fmt: skip


def one_by_one(codes: Codes) -> Any:
    """Each number from the bits of its own code."""
    found = np.empty((codes.rows, codes.cols), np.float32)
    for row in range(codes.rows):
        line = b"" if codes.order == ACROSS else np.ascontiguousarray(codes.packed[row]).tobytes()
        number = int.from_bytes(line, "little")
        for col in range(codes.cols):
            if codes.order == ACROSS:
                word = int(codes.packed[col, row // 8]) & 0xFFFFFFFF
                code = word >> 4 * (0, 4, 1, 5, 2, 6, 3, 7)[row % 8] & 15
            elif codes.order == HIGH_FIRST:
                code = line[col // 2] >> (0 if col % 2 else 4) & 15
            else:
                code = number >> (col * codes.bits) & ((1 << codes.bits) - 1)
            group = (codes.first + col) // codes.run if codes.index is None else codes.index[col]
            zero = np.float32(0) if codes.zeros is None else codes.zeros[row, group]
            with np.errstate(all="ignore"):
                found[row, col] = (codes.table[code] - zero) * codes.scales[row, group] * np.float32(codes.factor)
    return found


def same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


@st.composite
def any_codes(draw: st.DrawFn) -> Codes:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    order = draw(st.sampled_from(list(ORDERS)))
    bits = draw(st.sampled_from([2, 3, 4, 8])) if order == LOW_FIRST else 4
    layout = draw(st.sampled_from(LAYOUTS)) if order == LOW_FIRST else "bytes"
    return some_codes(rng, order, bits, draw(st.integers(1, 17)), draw(st.integers(1, 300)), layout)


@settings(max_examples=60, deadline=None)
@given(codes=any_codes())
def test_every_loop_gives_each_number(codes: Codes) -> None:
    wanted = one_by_one(codes)
    for loop in LOOPS:
        with forced(loop):
            assert same(decode(codes), wanted), loop
            assert same(decode(codes, transposed=True), wanted.T)


@settings(max_examples=30, deadline=None)
@given(codes=any_codes(), dtype=st.sampled_from([DType.BF16, DType.F16]))
def test_every_loop_rounds_each_number_once_more(codes: Codes, dtype: DType) -> None:
    values = one_by_one(codes).astype(np.float64)
    for loop in LOOPS:
        for is_transposed in (False, True):
            wanted = arithmetic.rounded_bits(values.T if is_transposed else values, dtype)
            written = bytearray(wanted.nbytes + 2)
            with forced(loop):
                is_finite = CodedRows(codes, is_transposed).round_into(memoryview(written)[:-2], dtype)
            assert written[:-2] == wanted.tobytes(), loop
            assert written[-2:] == bytes(2)
            assert is_finite == np.isfinite(values_of(wanted, dtype)).all(), loop


def test_nothing_to_decode() -> None:
    empty = np.zeros((0, 4), np.uint8)
    codes = Codes(packed=empty, cols=8, bits=4, table=np.zeros(16, "f4"), scales=np.zeros((0, 1), "f4"), run=8)
    for loop in LOOPS:
        with forced(loop):
            assert decode(codes).shape == (0, 8)
            assert decode(replace(codes, cols=0), transposed=True).shape == (0, 0)


def sample() -> Iterator[Codes]:
    rng = np.random.default_rng(3)
    for number in range(45):
        order = list(ORDERS)[number % 3]
        bits = int(rng.choice([2, 3, 4, 8])) if order == LOW_FIRST else 4
        rows, cols = int(rng.integers(1, 20)), int(rng.integers(1, 300))
        yield some_codes(rng, order, bits, rows, cols, LAYOUTS[number // 3 % 3] if order == LOW_FIRST else "bytes")


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_compiler_decodes_the_same(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None or not can_build():
        pytest.skip(f"no {compiler} here")
    compile_loops.compile_library(compiler, tmp_path / "kernel.so")
    library = ctypes.CDLL(str(tmp_path / "kernel.so"))
    for kernel in compiled._kernels().values():
        other = Kernel(library, kernel.width)
        for codes in sample():
            found = np.empty((codes.rows, codes.cols), np.float32)
            packed._compiled(other, codes, found.ctypes.data, DType.F32, transposed=False)
            assert same(found, one_by_one(codes))


@pytest.mark.skipif(not can_build(), reason="no compiler for the driver")
def test_another_machine_decodes_and_converts_the_same(driver: list[str]) -> None:  # noqa: F811
    tried, given_values = list(sample()), list(conversions())
    request = b"".join(map(encoded, tried)) + b"".join(converted(*one) for one in given_values)
    done = subprocess.run(driver, input=request, capture_output=True, check=True)
    rest = memoryview(done.stdout)
    for codes in tried:
        wanted = one_by_one(codes)
        assert same(np.frombuffer(rest[: wanted.nbytes], np.float32).reshape(wanted.shape), wanted)
        rest = rest[wanted.nbytes :]
    for bits, dtype, out in given_values:
        wanted = arithmetic.rounded_bits(values_of(bits, dtype), out)
        assert same(np.frombuffer(rest[: wanted.nbytes], wanted.dtype), wanted)
        assert bool(rest[wanted.nbytes]) == bool(np.isfinite(values_of(wanted, out)).all())
        rest = rest[wanted.nbytes + 1 :]
    assert not rest.nbytes


def encoded(codes: Codes) -> bytes:
    """As driver.c reads them."""
    stored, table = np.ascontiguousarray(codes.packed), np.zeros(256, np.float32)
    table[: len(codes.table)] = codes.table
    row_step, word_step = (0, stored.strides[0]) if codes.order == ACROSS else (stored.strides[0], 4)
    rows, groups = codes.scales.shape
    head = (2, codes.bits, ORDERS[codes.order], rows, groups, codes.cols, stored.nbytes, rows * codes.cols * 4)
    more = (row_step, word_step, codes.run, codes.first, 0, codes.zeros is not None, codes.index is not None, 0)
    parts = [stored, table, codes.scales, *(one for one in (codes.zeros, codes.index) if one is not None)]
    return np.array((*head, *more), np.int64).tobytes() + b"".join(one.tobytes() for one in parts)


def conversions() -> Iterator[tuple[Any, DType, DType]]:
    rng = np.random.default_rng(4)
    for number, (dtype, out) in enumerate((one, other) for one in TAKEN for other in TAKEN if one is not other):
        count = 200 + number
        bits = rng.integers(0, 1 << (8 * dtype.itemsize), count, np.uint64).astype(UNSIGNED[dtype])
        finite = arithmetic.rounded_bits(rng.standard_normal(count), dtype)
        yield bits, dtype, out
        yield finite, dtype, out


def converted(bits: Any, dtype: DType, out: DType) -> bytes:
    """As driver.c reads them."""
    head = (3, TYPES[dtype], TYPES[out], 0, 0, len(bits), bits.nbytes, len(bits) * out.itemsize)
    return np.array(head, np.int64).tobytes() + bits.tobytes()


def test_conversions_round_as_float64_does() -> None:
    for bits, dtype, out in conversions():
        wanted = arithmetic.rounded_bits(values_of(bits, dtype), out)
        for loop in LOOPS:
            found = np.zeros_like(wanted)
            with forced(loop):
                is_finite = arithmetic.convert(memory(bits), dtype, memory(found), out)
            np.testing.assert_array_equal(found, wanted)
            assert is_finite == bool(np.isfinite(values_of(wanted, out)).all())


def test_every_float16_that_a_float32_may_round_to() -> None:
    """Middles between neighbors, and what is next to them, for all numbers of both types of 16 bits."""
    for out in (DType.BF16, DType.F16):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            near = values_of(np.arange(1 << 16, dtype=np.uint16), out).astype(np.float32).view(np.uint32)
        for off in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001):
            bits = near + np.uint32(off)
            wanted, found = arithmetic.rounded_bits(values_of(bits, DType.F32), out), np.zeros(1 << 16, np.uint16)
            arithmetic.convert(memory(bits), DType.F32, memory(found), out)
            np.testing.assert_array_equal(found, wanted)
