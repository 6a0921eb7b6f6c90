"""Bytes of floats decoded by numpy are the numbers that torch reads, and units are the distances of neighbours."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from containers.torch_files import raw_bytes
from torch import Tensor

from loraformat.errors import UnsupportedUpdate
from loraformat.model.floats import ROUNDOFF, SMALLEST_LOST, decoded, float64_of, unit_in_last_place
from loraformat.model.tensors import DType, LazyTensor, bytes_of, numbers_of, rounded

FLOATS = [dtype for dtype in DType if dtype.is_floating]
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
HALVES = [DType.BF16, DType.F16]


def patterns() -> Tensor:
    """All patterns of 16 bits."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)


def samples(dtype: DType) -> Tensor:
    """Numbers of every size that a dtype has, subnormal ones among them; all of them where it has 16 bits."""
    if dtype in HALVES:
        return patterns().view(dtype.torch)
    info = torch.finfo(dtype.torch)
    sizes = torch.logspace(math.log2(info.smallest_normal) - 8, math.log2(info.max) - 1, 500, 2, dtype=torch.float64)
    return torch.cat([sizes, -sizes, torch.tensor([0.0, math.inf, -math.inf, math.nan])]).to(dtype.torch)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decoded_is_what_torch_reads(dtype: DType) -> None:
    values = samples(dtype)
    np.testing.assert_array_equal(decoded(bytearray(raw_bytes(values)), dtype), values.double().numpy())


@pytest.mark.parametrize("dtype", HALVES)
def test_units_are_the_distance_to_the_next_value(dtype: DType) -> None:
    sizes = patterns()[: 1 << 15].view(dtype.torch).double()
    sizes = sizes[sizes.isfinite()].numpy()
    np.testing.assert_array_equal(unit_in_last_place(sizes[:-1], dtype), np.diff(sizes))


@pytest.mark.parametrize(("dtype", "kind"), [(DType.F32, np.float32), (DType.F64, np.float64)])
def test_units_of_wide_floats_are_those_of_numpy(dtype: DType, kind: type) -> None:
    sizes = samples(dtype).abs().numpy()
    sizes = sizes[np.isfinite(sizes)]
    np.testing.assert_array_equal(unit_in_last_place(sizes.astype(np.float64), dtype), np.spacing(sizes).astype(kind))


@pytest.mark.parametrize("dtype", [*FLOATS, DType.I32])
def test_values_are_the_same_with_and_without_bytes(dtype: DType) -> None:
    values = torch.arange(12).view(3, 4).to(dtype.torch)
    lazy = LazyTensor.of(values)
    raw = LazyTensor(lazy.shape, lazy.dtype, lazy.read, lambda start, stop: bytearray(raw_bytes(values[start:stop])))
    for one in (lazy, raw, raw.rows(1, 3), raw.reshape(3, 2, 2), raw.T, raw.reshape(4, 3)):
        found = float64_of(one)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, one.torch().double().numpy())


def test_a_scalar_has_one_value() -> None:
    lazy = LazyTensor(
        (), DType.F32, lambda _start, _stop: np.array(2.5, np.float32), lambda _a, _b: bytearray(b"\0\0 @")
    )
    assert float64_of(lazy).shape == ()
    assert float64_of(lazy) == 2.5


def every_code(dtype: DType) -> Tensor:
    """All numbers of at most 16 bits, all combinations of edge bytes of a wider one."""
    if dtype is DType.BOOL:
        return torch.tensor([False, True])
    if dtype.itemsize <= 2:
        codes = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
        return codes.to({1: torch.int8, 2: torch.int16}[dtype.itemsize]).view(dtype.torch)
    edges = torch.tensor([0, 1, 0x7F, 0x80, 0xFF], dtype=torch.uint8)
    return torch.cartesian_prod(*[edges] * 4).flatten().repeat(2).view(dtype.torch)


@pytest.mark.parametrize("has_bytes", [True, False])
@pytest.mark.parametrize("dtype", list(DType))
def test_load_gives_the_numbers_that_torch_reads(dtype: DType, has_bytes: bool) -> None:
    values = every_code(dtype)
    raw = (lambda a, b: bytearray(raw_bytes(values[a:b]))) if has_bytes else None
    is_narrow = dtype in (DType.BF16, DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0)
    wanted = (values.to(torch.float32) if is_narrow else values).numpy()
    lazy = LazyTensor(wanted.shape, dtype, lambda a, b: wanted[a:b], raw)
    found = lazy.load()
    assert found.dtype == dtype.numpy == wanted.dtype
    again = lazy.torch()
    assert again.dtype == dtype.torch
    with np.errstate(invalid="ignore"):  # numpy before 2.3 warns where complex numbers have a NaN
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(again.to(values.dtype if not is_narrow else torch.float32).numpy(), wanted)


@pytest.mark.parametrize("has_bytes", [True, False])
def test_a_loaded_array_may_be_changed(has_bytes: bool) -> None:
    values = np.zeros(3, np.float32)
    raw = (lambda a, b: bytearray(values[a:b].tobytes())) if has_bytes else None
    lazy = LazyTensor((3,), DType.F32, lambda a, b: values[a:b], raw)
    lazy.load()[0] = 1
    assert not lazy.load().any()
    assert not values.any()


def test_loading_stored_values_needs_no_torch() -> None:
    probe = (
        "import sys, loraformat\n"
        f"adapter = loraformat.load_adapter({str(FIXTURES / 'good' / 'peft' / 'rslora')!r})\n"
        "print(*[update.up.load().shape for (update,) in adapter.updates.values()], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_loses_what_torch_says(dtype: DType) -> None:
    info = torch.finfo(dtype.torch)
    assert info.eps / 2 == ROUNDOFF[dtype]
    assert info.smallest_normal * info.eps / 2 == SMALLEST_LOST[dtype]


@pytest.mark.filterwarnings("error")
def test_complex_numbers_are_not_cut_to_their_real_parts() -> None:
    with pytest.raises(UnsupportedUpdate, match="complex"):
        float64_of(LazyTensor.of(np.array([1 + 2j], np.complex64)))


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0])
def test_every_code_of_float8_comes_back(dtype: DType) -> None:
    """NaN too, with what it carries: from bytes, and by way of a torch tensor."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = numbers_of(bytearray(codes.numpy()), dtype)
    assert bytes(bytes_of(values, dtype)) == bytes(range(256))
    again = LazyTensor.of(codes.view(dtype.torch))
    assert bytes(bytes_of(again.load(), dtype)) == bytes(range(256))
    assert again.torch().view(torch.uint8).equal(codes)


def test_infinity_has_no_power_of_two() -> None:
    """OCP Microscaling Formats 1.0: E8M0 has NaN, and no infinity."""
    found = rounded(np.array([math.inf, -math.inf, math.nan, 2.0**127, 1.0]), DType.F8_E8M0)
    np.testing.assert_array_equal(found, np.array([np.nan, np.nan, np.nan, 2.0**127, 1.0], np.float32))


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_integers_are_rounded_once(kind: type) -> None:
    """One more than a middle of bfloat16 goes up, however large; one less goes down."""
    sizes = [(1 << power) + (1 << power - 8) for power in range(9, 63)]
    middles = np.array(sizes, kind)
    above = [2.0**power + 2.0 ** (power - 7) for power in range(9, 63)]
    np.testing.assert_array_equal(rounded(middles + kind(1), DType.BF16), np.array(above, np.float32))
    below = [2.0**power for power in range(9, 63)]
    np.testing.assert_array_equal(rounded(middles - kind(1), DType.BF16), np.array(below, np.float32))
    if kind is np.int64:
        np.testing.assert_array_equal(rounded(-middles - 1, DType.BF16), -np.array(above, np.float32))
        np.testing.assert_array_equal(rounded(np.array([-(2**63)]), DType.BF16), np.array([-(2.0**63)], np.float32))


def test_views_that_torch_has_not_computed_are_taken() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    np.testing.assert_array_equal(LazyTensor.of(values.conj()).load(), np.array([1 - 2j, 3 + 4j], np.complex64))
    np.testing.assert_array_equal(LazyTensor.of(values.conj().imag).load(), np.array([-2, 4], np.float32))


def test_big_endian_arrays_are_taken() -> None:
    values = np.array([1.5, -2.0], ">f4")
    lazy = LazyTensor.of(values)
    assert lazy.dtype is DType.F32
    np.testing.assert_array_equal(lazy.load(), values)
    assert bytes(bytes_of(lazy.load(), DType.F32)) == values.astype("<f4").tobytes()
