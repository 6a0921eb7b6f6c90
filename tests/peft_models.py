"""Tiny torch models with real PEFT adapters of every tuner, saved as users have them.

A base file and an adapter folder each.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Net(nn.Module):
    """Linear layers of three shapes, convolutions, a table and a norm; no forward is needed for a merge."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 132)
        self.tall = nn.Linear(132, 24, bias=False)
        self.square = nn.Linear(24, 24)
        self.odd = nn.Linear(23, 31)
        self.conv = nn.Conv2d(6, 8, 3)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.line = nn.Conv1d(6, 8, 3)
        self.embed = nn.Embedding(70, 24)
        self.norm = nn.LayerNorm(24)
        self.embed_tokens = nn.Embedding(40, 16)


class Gpt(nn.Module):
    """The transposed layers of GPT-2."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn = Conv1D(72, 24)
        self.c_proj = Conv1D(24, 24)
        self.c_fc = Conv1D(130, 24)


@dataclass(frozen=True)
class Case:
    """One adapter: the PEFT config's class name and fields, and the model that it goes on."""

    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Net
    settings: Mapping[str, Any] = field(default_factory=dict)


def make(case: Case, folder: Path, *, seed: int = 0) -> dict[str, Tensor]:
    """Write `folder/base` and `folder/adapter`; PEFT's own merge, by the names of the base."""
    import peft

    torch.manual_seed(seed)
    model = case.model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    if case.settings or case.model is Gpt:
        settings = {"model_type": "gpt2", **case.settings} if case.model is Gpt else dict(case.settings)
        (folder / "base" / "config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, getattr(peft, case.config)(**case.fields))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        adapted.save_pretrained(folder / "adapter")
        fresh = case.model()
        fresh.load_state_dict(base)
        loaded = peft.PeftModel.from_pretrained(fresh, folder / "adapter")
        merged = loaded.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
