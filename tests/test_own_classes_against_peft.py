"""Models of classes that transformers does not have: what PEFT tells by the layers' classes, shapes have to tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import loraformat
from loraformat.errors import UnsupportedUpdate
from loraformat.io import open_adapter


class Mixed(nn.Module):
    """A Conv1D and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = transformers.pytorch_utils.Conv1D(24, 16)
        self.down = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.c_fc(x).relu())


class Experts(nn.Module):
    """Several parameters of other shapes in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(3, 16, 24))
        self.w_out = nn.Parameter(torch.randn(3, 24, 16))
        self.w_gate = nn.Parameter(torch.randn(3, 16, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = (x @ self.w_gate).mean(dim=-1, keepdim=True)
        return ((x @ self.w_in).relu() * gate @ self.w_out).sum(dim=0)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def merged(model: nn.Module, folder: Path, **lora: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any]:
    (folder / "base").mkdir()
    save_file(
        {name: value.detach().clone() for name, value in model.state_dict().items()}, folder / "base" / "m.safetensors"
    )
    config = {"architectures": ["SomebodysModel"], "model_type": "somebodys"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **lora))
    tiny.randomize(both)
    both.save_pretrained(folder / "adapter")
    report = loraformat.merge(str(folder / "base"), [str(folder / "adapter")], str(folder / "out"), verify="full")
    return load_file(folder / "out" / "m.safetensors"), both.merge_and_unload().state_dict(), report


def test_layers_that_store_the_transpose_beside_others_that_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mine, theirs, report = merged(Block(Mixed()), tmp_path, target_modules=["c_fc", "down"])
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-5)
    (told,) = [finding.message for finding in report.findings if finding.code == "LF818"]
    assert told.endswith("inner.c_fc.weight")


def test_parameters_of_one_module_are_told_by_their_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ["inner.w_in", "inner.w_gate"]
    mine, theirs, _ = merged(Block(Experts()), tmp_path, target_modules=[], target_parameters=names)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-5)


def test_parameters_of_one_shape_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedUpdate, match="several parameters of one module"):
        merged(Block(Experts()), tmp_path, target_modules=[], target_parameters=["inner.w_in", "inner.w_out"])


def test_without_a_base_the_parameters_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    merged(Block(Experts()), tmp_path, target_modules=[], target_parameters=["inner.w_in", "inner.w_gate"])
    with pytest.raises(UnsupportedUpdate) as caught:
        open_adapter(str(tmp_path / "adapter"))
    assert caught.value.hint == "pass --base to tell them apart by their shapes"
