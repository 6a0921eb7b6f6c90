"""A base that the toy scheme quantizes, an adapter for it, and what their merge must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merger.checkpoints import config
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, ROWS = 24, 130
Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.{}.mlp.up_proj"
QUANTIZED = {form.format(n): (HIDDEN if form == Q else ROWS, HIDDEN) for form in (Q, UP) for n in range(2)}
TOUCHED = (Q.format(0), UP.format(1))


def dense_tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(70, HIDDEN, generator=g) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= {f"model.layers.{n}.input_layernorm.weight": torch.randn(HIDDEN, generator=g) for n in range(2)}
    return {name: value.bfloat16() for name, value in tensors.items()}


def coded_tensors(group: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for module, (rows, cols) in QUANTIZED.items():
        tensors[f"{module}.qweight"] = torch.randint(-128, 128, (rows, cols), generator=g, dtype=torch.int8)
        tensors[f"{module}.scales"] = torch.rand(rows, -(-cols // group), generator=g) / 64
    tensors[f"{TOUCHED[0]}.input_scale"] = torch.rand(1, generator=g)
    return tensors


def quantized_base(folder: Path, group: int = 5, *, shards: int = 1, **settings: object) -> Path:
    """One file, or codes in the first of two and scales in the second."""
    folder.mkdir()
    quantization = {"quant_method": "toy", "group_size": group, "modules_to_not_convert": ["lm_head"]}
    described = config(torch_dtype="bfloat16", quantization_config=quantization, kept={"a": [1]})
    (folder / "config.json").write_text(json.dumps({**described, **settings}))
    (folder / "quant_config.json").write_text(json.dumps({"modules_to_not_convert": ["lm_head"]}))
    tensors = {**dense_tensors(), **coded_tensors(group)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, is_scale in enumerate((False, True), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        part = {name: value for name, value in tensors.items() if name.endswith(("scale", "scales"))}
        part = part if is_scale else {name: value for name, value in tensors.items() if name not in part}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def factors(modules: tuple[str, ...] = TOUCHED) -> dict[str, tuple[Tensor, Tensor]]:
    """Small multiples of 1/32, so that float64 has every sum exactly, in whatever order it is made."""
    g = torch.Generator().manual_seed(3)
    shapes = QUANTIZED | {"lm_head": (70, HIDDEN)}
    return {
        module: (
            torch.randint(-9, 10, (3, HIDDEN), generator=g) / 32,
            torch.randint(-9, 10, (shapes[module][0], 3), generator=g) / 32,
        )
        for module in modules
    }


def adapter(folder: Path, modules: tuple[str, ...] = TOUCHED) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (down, up) in factors(modules).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.split(".")[-1] for module in modules})
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def exact(module: str, group: int = 5) -> NDArray[np.float64]:
    """The weight by the definition of the scheme: the product in float64, rounded to float32."""
    tensors = coded_tensors(group)
    codes, scales = (tensors[f"{module}.{part}"].double().numpy() for part in ("qweight", "scales"))
    columns = np.arange(codes.shape[1]) // group
    return (codes * scales[:, columns]).astype(np.float32).astype(np.float64)


def merged(module: str, group: int = 5) -> NDArray[np.float64]:
    value = exact(module, group)
    if module in TOUCHED:
        down, up = (factor.double().numpy() for factor in factors()[module])
        value = value + 2.0 * (up @ down)
    return value


def rounded(values: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


def written_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
