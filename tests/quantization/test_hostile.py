"""Every part and every setting of every scheme replaced by what nobody expects: read the same way twice, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization.encoders import ENCODERS, Encoded, write
from safetensors.torch import save_file

from loraformat.containers import open_checkpoint
from loraformat.containers.quantized import reference_rows
from loraformat.errors import LoraFormatError

ODD: list[Any] = [None, True, -1, 0, 1, 3, 2**70, 1.5, float("inf"), "", "x", [], [0], [1, 2], {}, {"a": 1}]


def encoded(name: str) -> Encoded:
    return ENCODERS[name](np.random.default_rng(4), 8, 32)


def is_read_or_refused(folder: Path) -> bool:
    """Whether it was read; both readers agree then, and nothing is larger than its codes allow."""
    held = (folder / "model.safetensors").stat().st_size
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            base = open_checkpoint(str(folder))
            for name in base.quantized.weights if base.quantized is not None else ():
                weight = base.weights[name]
                assert base.quantized is not None
                assert np.prod([float(size) for size in weight.shape]) <= 4 * held
                found = np.asarray(weight.read(0, weight.rows), np.float64)
                wanted = reference_rows(base.quantized, base.tensors[name], 0, weight.rows)
                assert found.shape == weight.shape
                assert np.array_equal(found, wanted, equal_nan=True), name
    except LoraFormatError:
        return False
    return True


def variants(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same bytes or fewer, of other shapes and dtypes."""
    flat = tensor.reshape(-1)
    yield flat[:0]
    yield flat[:1]
    yield flat[:1].reshape(())
    yield flat
    yield flat.reshape(-1, 1)
    yield flat.reshape(1, -1)
    yield flat.reshape(1, 1, -1)
    yield flat[:0].reshape(0, *tensor.shape)
    yield torch.zeros(*tensor.shape[:-1], 0, dtype=tensor.dtype)
    raw = flat.view(torch.uint8)
    yield raw
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool):
        yield torch.zeros(tensor.shape, dtype=dtype)
        yield torch.ones(tensor.shape, dtype=dtype)
    yield (255 - raw).view(tensor.dtype).reshape(tensor.shape)
    for value in (0, 127, 128, 255):
        yield torch.full_like(raw, value).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("name", ENCODERS)
def test_parts(tmp_path: Path, name: str) -> None:
    one = encoded(name)
    folder = write(tmp_path / "b", one)
    assert is_read_or_refused(folder)
    refused = 0
    for part, tensor in one.tensors.items():
        for other in variants(tensor):
            changed = {**one.tensors, part: other.clone()}
            save_file({key: value.contiguous() for key, value in changed.items()}, folder / "model.safetensors")
            refused += not is_read_or_refused(folder)
    assert refused > 5 * len(one.tensors)


def changed(value: Any) -> Iterator[Any]:
    """A value with one thing inside it changed, wherever it lies."""
    yield from ODD
    if isinstance(value, dict):
        for key in value:
            yield {other: inner for other, inner in value.items() if other != key}
            yield from ({**value, key: inner} for inner in changed(value[key]))
    if isinstance(value, list):
        for at in range(len(value)):
            yield from ([*value[:at], inner, *value[at + 1 :]] for inner in changed(value[at]))


@pytest.mark.parametrize("name", ENCODERS)
def test_settings(tmp_path: Path, name: str) -> None:
    one = encoded(name)
    folder = write(tmp_path / "b", one)
    settings, file = one.settings, "config.json"
    if not settings:
        file, settings = next(iter(one.files.items()))
    for other in changed(settings):
        said = {"model_type": "llama", "quantization_config": other} if file == "config.json" else other
        (folder / file).write_text(json.dumps(said))
        is_read_or_refused(folder)


@pytest.mark.parametrize("name", [name for name in ENCODERS if "bitsandbytes" in name and "INT8" not in name])
def test_states(tmp_path: Path, name: str) -> None:
    one = encoded(name)
    folder = write(tmp_path / "b", one)
    part = next(key for key in one.tensors if "quant_state" in key)
    state = json.loads(bytes(one.tensors[part].tolist()))
    for other in (*changed(state), "[" * 5000, {**state, "shape": [1 << 39, 1 << 39]}, {**state, "shape": [256]}):
        text = other.encode() if isinstance(other, str) else json.dumps(other).encode()
        tensors = {**one.tensors, part: torch.tensor(list(text), dtype=torch.uint8)}
        save_file(tensors, folder / "model.safetensors")
        is_read_or_refused(folder)
