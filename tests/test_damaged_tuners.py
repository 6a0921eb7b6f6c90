"""Adapters of every tuner with one tensor damaged: an error of ours or a sound result, never another exception."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_models import make
from safetensors.torch import load_file, save_file
from test_tuners_against_peft import CASES
from torch import Tensor

from loraformat import load_adapter
from loraformat.errors import LoraFormatError
from loraformat.jobs.inspect import inspect
from loraformat.jobs.merge import merge
from loraformat.model.updates import tensors

DAMAGED = (
    *("adalora", "beft", "boft", "c3a", "delora", "fourierft", "gralora-hybrid", "hra", "ia3", "ln-tuning"),
    *(
        "loha-effective",
        "lokr-both",
        "miss-mini",
        "oft-shared",
        "pvera",
        "randlora",
        "road-4",
        "shira",
        "supertuning-lora",
    ),
    *("hira", "tinylora", "unilora"),
    *("deft", "deft-qr", "frod-dense", "glora-constant-vector-vector", "glora-lora-lora-constant", "miss-bat", "osf"),
    "peanut-depth-1",
    *("trainable-tokens", "vblora", "vblora-topk", "vera", "waveft"),
)

MANY = 4  # tensors, of which each has every other damage


def damages(value: Tensor) -> Iterator[Tensor]:
    yield value[:-1].clone()
    yield value[..., :-1].clone()
    yield value.flatten().clone()
    yield value[None].clone()
    yield value.new_zeros(0)
    yield value.new_zeros(())
    yield value.transpose(0, -1).contiguous()
    yield torch.cat([value, value])
    yield torch.cat([value, value], dim=-1)
    yield value + 1000
    yield value * 0
    if value.is_floating_point():
        yield value * float("inf")
        yield value * float("nan")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tensor_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path)
    base, adapter, out = (str(tmp_path / part) for part in ("base", "adapter", "out"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    kinds = {key.rpartition("square")[2] if "square" in key else key: key for key in whole if "wide" not in key}
    for place, key in enumerate(kinds.values()):
        for number, damaged in enumerate(damages(whole[key])):
            if len(kinds) >= MANY and (number + place) % 2:
                continue  # the next tensor has this damage
            save_file({**whole, key: damaged}, file)
            with suppress(LoraFormatError):
                inspect(adapter, base=base, norms=True)
            with suppress(LoraFormatError):
                merge(base, [adapter], out)
            shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("name", DAMAGED)
def test_infinite_values_are_read_without_a_warning(name: str, tmp_path: Path) -> None:
    """All warnings are errors here; who uses the values judges them."""
    make(CASES[name], tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: value / 0 if value.is_floating_point() else value for key, value in whole.items()}, file)
    found = []
    for chain in load_adapter(tmp_path / "adapter", base=tmp_path / "base").updates.values():
        for _, tensor in (pair for update in chain for pair in tensors(update)):
            with suppress(LoraFormatError):
                found.append(bool(np.isfinite(tensor.load()).all()))
    assert not all(found)
