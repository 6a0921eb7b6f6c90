"""Adapters that PEFT made on one small net, and what PEFT makes of a folder: the ΔW of each module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Two blocks of linear layers, convolutions, a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(24, 48), "down": nn.Linear(48, 24)}) for _ in "ab"])
        self.conv = nn.Conv2d(6, 8, 3)
        self.point = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


TARGETS = ["up", "down", "conv", "point", "embed"]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def save(folder: Path, seed: int, config: Any = None, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A folder with an adapter of random factors."""
    import peft

    settings = {"r": 8, "lora_alpha": 12, "target_modules": TARGETS, **fields}
    model = peft.get_peft_model(net(), config or peft.LoraConfig(**settings))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad or "modules_to_save.default" in name:
                value.copy_(torch.randn(value.shape, generator=g) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def deltas(folder: Path | str) -> dict[str, np.ndarray[Any, Any]]:
    """ΔW of each module as PEFT adds it, in the shape of the weight."""
    import peft

    model = peft.PeftModel.from_pretrained(net().double(), str(folder), autocast_adapter_dtype=False).double()
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            key = name.removeprefix("base_model.model.")
            found[key] = module.get_delta_weight("default").detach().numpy()
    return found


def matrix(delta: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return delta.reshape(delta.shape[0], -1)
