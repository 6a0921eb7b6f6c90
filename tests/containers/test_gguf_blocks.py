"""Block types of GGUF: the values of the gguf package, bit for bit, by the decoder and by its reference."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from loraformat.containers.gguf.block_reference import reference
from loraformat.containers.gguf.blocks import DECODERS, are_finite, decode
from loraformat.containers.gguf.types import BY_NAME


@pytest.mark.parametrize("kind", DECODERS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    """Any bytes: scales that are infinite or NaN, subnormal and negative ones among them."""
    one = BY_NAME[kind]
    data = np.random.default_rng(sum(kind.encode())).integers(0, 256, (3000, one.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(-1, one.elements)
    found = decode(kind, data, one.elements)
    is_number = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(found), ~is_number)
    assert np.array_equal(found.view("<u4")[is_number], wanted.view("<u4")[is_number])
    assert np.array_equal(reference(kind, data, one.elements), found.astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("kind", DECODERS)
def test_scales_tell_whether_values_are_numbers(kind: str) -> None:
    """Block by block: an infinite scale gives NaN where its code is 0, and else infinity."""
    one = BY_NAME[kind]
    data = np.random.default_rng(9).integers(0, 256, (4000, one.nbytes), dtype=np.uint8)
    values = decode(kind, data, one.elements)
    for number in range(len(data)):
        block = slice(number, number + 1)
        assert are_finite(kind, data[block], values[block]) == bool(np.isfinite(values[block]).all())


def test_every_scale_of_mxfp4_is_its_power_of_two() -> None:
    """Also those that are subnormal in float32."""
    data = np.zeros((256, 17), np.uint8)
    data[:, 0], data[:, 1] = np.arange(256), 0x21
    found = decode("MXFP4", data, 32)
    assert found[:, 0].tolist() == [2.0 ** (power - 128) for power in range(256)]
    assert found[:255, 16].tolist() == [2.0 ** (power - 127) for power in range(255)]
