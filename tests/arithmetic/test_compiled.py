"""The loops as other compilers and machines build them, and which of them is chosen."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from arithmetic.cases import LOOPS, Case, factors, memory, values_of, window
from arithmetic.test_tallies import SIX_DIGITS

import compile_loops
from loraformat import arithmetic
from loraformat.arithmetic import compiled
from loraformat.arithmetic.compiled import Kernel
from loraformat.errors import UsageError
from loraformat.model.tensors import DType

HERE = Path(__file__).parent
TYPES = compiled._TYPES
TILE_FIGURES = 4


def can_build() -> bool:
    """Whether this machine can build the loops and run them, as its own files say."""
    if not compile_loops.loops_of(platform.machine()) or not compile_loops.compiler_of_this_machine():
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return True
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    return {"avx2", "fma", "f16c"} <= set(flags)


@pytest.mark.skipif(not can_build(), reason="no compiler, or a processor without fused multiply-adds")
def test_the_loops_are_there_where_they_can_be() -> None:
    """A source that does not compile, or another version number than ours, must not show as skipped tests only."""
    assert arithmetic.open_kernel() is not None
    assert arithmetic.loop() != "numpy"


def sample() -> Iterator[Case]:
    """A window of every pair of types, with rows, columns and terms left over."""
    rng = np.random.default_rng(0)
    kinds = ["usual", "scaled", "cancels", "middle", "zeros", "lopsided", "sparse", "extreme"]
    for number in range(45):
        dtype, out = list(TYPES)[number % 3], list(TYPES)[number // 3 % 3]
        rows, cols, rank = (int(rng.integers(*bounds)) for bounds in ((1, 90), (1, 60), (0, 40)))
        bits = arithmetic.rounded_bits(rng.standard_normal((rows, cols)) * 0.05, dtype)
        bits[rng.random(bits.shape) < 0.05] = rng.integers(0, 1 << 16)
        left, right = factors(rng, kinds[number % 8], rows, cols, rank, values_of(bits, dtype), out)
        yield Case(bits, dtype, out, left, right)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_compiler_gives_the_same_bytes(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None or not can_build():
        pytest.skip(f"no {compiler} here")
    built = compiled._LIBRARY
    if compiler != Path(compile_loops.compiler_of_this_machine() or "").name or not built.exists():
        built = tmp_path / "kernel.so"
        compile_loops.compile_library(compiler, built)
    library = ctypes.CDLL(str(built))
    assert library.loraformat_kernel_version() == compiled._VERSION
    for case in sample():
        for loop, kernel in compiled._kernels().items():
            other, packed = Kernel(library, kernel.width), arithmetic.pack(case.left, case.right)
            wanted, tallies = window(case, loop)
            found, rows = np.zeros_like(wanted), len(wanted)
            again = other.window(packed, 0, rows, memory(case.bits), case.dtype, memory(found), case.out)
            np.testing.assert_array_equal(found, wanted)
            assert repr(again) == repr(tallies)
            np.testing.assert_array_equal(other.product(packed, 0, rows), kernel.product(packed, 0, rows))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the driver on another machine: the one that the variable has, or one for aarch64."""
    if command := os.environ.get("LORAFORMAT_DRIVER"):
        return shlex.split(command)
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"no {compiler} or no {emulator}: on Debian, gcc-aarch64-linux-gnu and qemu-user")
    folder = tmp_path_factory.mktemp("driver")
    objects = compile_loops.compile_objects(compiler, compile_loops.loops_of("aarch64"), folder)
    compile_loops.run(compiler, "-static", HERE / "driver.c", *objects, "-o", folder / "driver")
    return [emulator, str(folder / "driver")]


@pytest.mark.skipif(not can_build(), reason="no loop of this machine to compare with")
def test_another_machine_gives_the_same_bytes(driver: list[str]) -> None:
    tried = list(sample())
    done = subprocess.run(driver, input=b"".join(map(encoded, tried)), capture_output=True, check=True)
    rest = memoryview(done.stdout)
    for case in tried:
        rows, cols = case.bits.shape
        wanted, tallies = window(case, LOOPS[0])
        found, figures = rest[: wanted.nbytes], rest[wanted.nbytes :]
        tiles = -(-rows // arithmetic.TILE)
        np.testing.assert_array_equal(np.frombuffer(found, wanted.dtype).reshape(rows, cols), wanted)
        sums = np.frombuffer(figures, np.float64, TILE_FIGURES * tiles).reshape(tiles, TILE_FIGURES)
        for one, other in zip(compiled._tallies(sums.tolist(), rows, cols), tallies, strict=True):
            assert (one.unchanged, one.numel) == (other.unchanged, other.numel)
            # A compiler may round the bound that decides in which precision a tile is summed.
            assert (one.kept, one.whole, one.largest) == pytest.approx(
                (other.kept, other.whole, other.largest), rel=SIX_DIGITS, abs=0, nan_ok=True
            )
        product = figures[sums.nbytes :]
        update = arithmetic.multiply(case.left, case.right)
        np.testing.assert_array_equal(np.frombuffer(product, np.float64, update.size).reshape(update.shape), update)
        rest = product[update.nbytes + sums.nbytes :]
    assert not rest.nbytes


def encoded(case: Case) -> bytes:
    """A window, and then the product, as driver.c reads them."""
    packed, (rows, cols) = arithmetic.pack(case.left, case.right), case.bits.shape
    written = rows * cols * case.out.itemsize
    found = b""
    for operation, raw, nbytes in ((0, case.bits.tobytes(), written), (1, b"", rows * cols * 8)):
        numbers = (operation, TYPES[case.dtype], TYPES[case.out], rows, packed.rank, cols, len(raw), nbytes)
        found += np.array(numbers, np.int64).tobytes() + raw + packed.left.tobytes() + packed.right.tobytes()
    return found


SELECTION = """
#include <stdio.h>
#include "kernel.h"
const struct loops loraformat_avx2, loraformat_avx512;
int loraformat_kernel_width(void);
int main(void) { printf("%d", loraformat_kernel_width()); return 0; }
"""


@pytest.mark.parametrize(
    ("processor", "width"),
    [("Nehalem", "0"), ("Haswell", "256"), ("Haswell,-fma", "0"), ("Haswell,-f16c", "0"), ("Haswell,-avx2", "0")],
)
def test_a_processor_without_the_instructions_has_no_loop(tmp_path: Path, processor: str, width: str) -> None:
    emulator, compiler = shutil.which("qemu-x86_64"), compile_loops.compiler_of_this_machine()
    if emulator is None or compiler is None or platform.machine() != "x86_64":
        pytest.skip("no qemu-x86_64 or no compiler for it: on Debian, qemu-user and gcc")
    (tmp_path / "selection.c").write_text(SELECTION)
    program = tmp_path / "selection"
    sources = (tmp_path / "selection.c", compile_loops.SOURCES / "kernel.c")
    compile_loops.run(compiler, "-static", "-I", compile_loops.SOURCES, *sources, "-o", program)
    done = subprocess.run([emulator, "-cpu", processor, program], capture_output=True, check=True, text=True)
    assert done.stdout == width


def test_the_variable_chooses_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOOPS:
        monkeypatch.setenv("LORAFORMAT_LOOP", name)
        assert arithmetic.loop() == name
    monkeypatch.setenv("LORAFORMAT_LOOP", "")
    assert arithmetic.loop() == LOOPS[0]


@pytest.mark.parametrize("name", ["avx1024", "neon" if platform.machine() == "x86_64" else "avx2"])
def test_a_loop_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LORAFORMAT_LOOP", name)
    with pytest.raises(UsageError, match=rf"LORAFORMAT_LOOP.*numpy.*{name}"):
        arithmetic.loop()


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_VERSION", -1)
    assert compiled._kernels.__wrapped__() == {}


def test_a_library_without_our_functions_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = compile_loops.compiler_of_this_machine()
    if compiler is None:
        pytest.skip("no compiler here")
    (tmp_path / "other.c").write_text("int something(void) { return 1; }")
    compile_loops.run(compiler, "-shared", "-fPIC", tmp_path / "other.c", "-o", tmp_path / "other.so")
    monkeypatch.setattr(compiled, "_LIBRARY", tmp_path / "other.so")
    assert compiled._kernels.__wrapped__() == {}


def test_threads_share_one_copy_of_the_factors() -> None:
    """Memory does not grow with windows or threads: what float32 needs of R is made once."""
    if len(LOOPS) < 2:
        pytest.skip("no compiled loop here")
    bits, kernel = np.zeros((64, 40), np.uint16), arithmetic.open_kernel()
    assert kernel is not None
    packed = arithmetic.pack(np.ones((64, 3)), np.ones((3, 40)))
    found = [np.zeros_like(bits) for _ in range(8)]

    def computed(into: np.ndarray) -> object:
        kernel.window(packed, 0, 64, memory(bits), DType.BF16, memory(into), DType.BF16)
        return packed.narrow(lambda _: pytest.fail("made a second time"))

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(computed, found))
    assert all(one is made[0] for one in made)
    for one in found:
        np.testing.assert_array_equal(values_of(one, DType.BF16), np.full(bits.shape, 3.0))


@pytest.mark.skipif(len(LOOPS) < 2, reason="no compiled loop here")
def test_a_window_by_itself_gives_the_same() -> None:
    """The function that makes its own copy of R, for checks from outside."""
    kernel = arithmetic.open_kernel()
    assert kernel is not None
    for case in sample():
        (rows, cols), packed = case.bits.shape, arithmetic.pack(case.left, case.right)
        wanted, tallies = window(case, LOOPS[0])
        found, figures = np.zeros_like(wanted), np.empty((-(-rows // arithmetic.TILE), TILE_FIGURES))
        kernel._window(
            *(kernel.width, case.bits.ctypes.data, TYPES[case.dtype], found.ctypes.data, TYPES[case.out]),
            *(packed.left.ctypes.data, packed.rank, packed.right.ctypes.data, rows, cols, arithmetic.TILE),
            figures.ctypes.data,
        )
        np.testing.assert_array_equal(found, wanted)
        assert repr(compiled._tallies(figures.tolist(), rows, cols)) == repr(tallies)


def test_no_library_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "_LIBRARY", tmp_path / "none.so")
    assert compiled._kernels.__wrapped__() == {}


CONTROLS = """
#include <xmmintrin.h>
unsigned get(void) { return _mm_getcsr(); }
void set(unsigned value) { _mm_setcsr(value); }
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or len(LOOPS) < 2, reason="needs a loop for x86-64")
def test_control_bits_of_the_processor_do_not_show(tmp_path: Path) -> None:
    """A library built with -ffast-math makes subnormal numbers zero in the thread that loads it."""
    compiler = compile_loops.compiler_of_this_machine()
    if compiler is None:
        pytest.skip("no compiler here")
    (tmp_path / "controls.c").write_text(CONTROLS)
    compile_loops.run(compiler, "-O1", "-fPIC", "-shared", tmp_path / "controls.c", "-o", tmp_path / "controls.so")
    controls, kernel = ctypes.CDLL(str(tmp_path / "controls.so")), arithmetic.open_kernel()
    assert kernel is not None
    bits = np.arange(1, 1 << 10, dtype=np.uint16)[None]  # subnormal numbers of float16
    packed = arithmetic.pack(np.full((1, 1), 0.7), np.full((1, bits.size), 2.0**-24))
    wanted, found = np.zeros_like(bits), np.zeros_like(bits)
    kernel.window(packed, 0, 1, memory(bits), DType.F16, memory(wanted), DType.F16)
    before, strange = controls.get(), 0xFFC0  # subnormal numbers taken for zero, all rounded towards zero
    controls.set(strange)
    kernel.window(packed, 0, 1, memory(bits), DType.F16, memory(found), DType.F16)
    after = controls.get()
    controls.set(before)
    assert after & strange == strange
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(wanted, bits + 1)
