"""Bytes of floats decoded by numpy are the numbers that torch reads, and units are the distances of neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loraformat.containers import bytes_of
from loraformat.model.floats import decoded, float64_of, unit_in_last_place
from loraformat.model.tensors import DType, LazyTensor

FLOATS = [dtype for dtype in DType if dtype.is_floating]
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
    np.testing.assert_array_equal(decoded(bytes_of(values), dtype), values.double().numpy())


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
    raw = LazyTensor(lazy.shape, lazy.dtype, lazy.read, lambda start, stop: bytearray(bytes_of(values[start:stop])))
    for one in (lazy, raw, raw.rows(1, 3), raw.reshape(3, 2, 2), raw.T, raw.reshape(4, 3)):
        found = float64_of(one)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, one.load().double().numpy())


def test_a_scalar_has_one_value() -> None:
    lazy = LazyTensor((), DType.F32, lambda _start, _stop: torch.tensor(2.5), lambda _a, _b: bytearray(b"\0\0 @"))
    assert float64_of(lazy).shape == ()
    assert float64_of(lazy) == 2.5
