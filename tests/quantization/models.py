"""Small models in every scheme, adapters for them, and what their merges must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quantization.encoders import ENCODERS, MODULE, Encoded
from safetensors.torch import save_file

Floats = NDArray[np.float64]

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
Q, K, V, O = (f"{ATTENTION}.{letter}_proj" for letter in "qkvo")  # noqa: E741 - the names of the projections
UP, GATE = f"{MLP}.up_proj", f"{MLP}.gate_proj"
MODULES = (Q, K, V, O, UP, GATE)
RANK = 3
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
LINEAR = [name for name in ENCODERS if not name.startswith("MXFP4")]


def encoded(name: str, modules: tuple[str, ...] = MODULES, out: int = 24, inputs: int = 64) -> dict[str, Encoded]:
    """Module → its weight in a scheme."""
    found = {}
    for number, module in enumerate(modules):
        one = ENCODERS[name](np.random.default_rng(number), out, inputs)
        tensors = {key.replace(MODULE, module): value for key, value in one.tensors.items()}
        found[module] = Encoded(tensors, one.settings, one.values, f"{module}.weight", one.dtype, one.files)
    return found


def save(
    folder: Path, weights: dict[str, Encoded], *, shards: int = 1, nested: bool = False, model_type: str = "llama"
) -> Path:
    """A base of these weights and two dense ones; by turns over several files, so that scales stand beside no codes."""
    folder.mkdir()
    one = next(iter(weights.values()))
    settings = {"quantization_config": one.settings} if one.settings else {}
    config: dict[str, Any] = {"model_type": model_type, "torch_dtype": one.dtype, "kept": {"a": [1]}}
    config |= {"text_config": {"b": 2, **settings}} if nested else settings
    (folder / "config.json").write_text(json.dumps(config))
    for name, value in one.files.items():
        (folder / name).write_text(json.dumps(value))
    tensors = dense(one.dtype)
    for weight in weights.values():
        tensors |= weight.tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def dense(dtype: str) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(9)
    shapes = {"model.norm.weight": (24,), "lm_head.weight": (10, 24)}
    return {name: torch.randn(*shape, generator=chance).to(getattr(torch, dtype)) for name, shape in shapes.items()}


def factors(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small multiples of 1/32, so that float64 has every sum exactly, in whatever order it is made."""
    chance = torch.Generator().manual_seed(seed)
    out, inputs = shape
    return (
        torch.randint(-9, 10, (RANK, inputs), generator=chance) / 32,
        torch.randint(-9, 10, (out, RANK), generator=chance) / 32,
    )


def adapter(
    folder: Path, weights: dict[str, Encoded], modules: tuple[str, ...], *, seed: int = 0, **config: Any
) -> Path:
    """A LoRA adapter of PEFT on some modules, with a scale of 2."""
    folder.mkdir()
    tensors = {}
    for number, module in enumerate(modules):
        down, up = factors(weights[module].values.shape, seed + number)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": down,
            f"base_model.model.{module}.lora_B.weight": up,
        }
        if config.get("use_dora"):
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude(weights[module].values.shape[0])
    return save_adapter(folder, tensors, modules, **config)


def magnitude(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(5)) + 0.5


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], modules: tuple[str, ...], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "a/b", **config}))
    return folder


def update(shape: tuple[int, ...], seed: int) -> Floats:
    """What `adapter` adds."""
    down, up = (factor.double().numpy() for factor in factors(shape, seed))
    return np.asarray(2.0 * (up @ down), np.float64)


# Digits and the least exponent of numbers that have them all.
_FORMS = {"bfloat16": (8, -125), "float16": (11, -13), "float32": (24, -125)}


def once(values: Any, dtype: str) -> torch.Tensor:
    """Float64 rounded to nearest, ties to even, without another format on the way (torch takes float32)."""
    digits, least = _FORMS[dtype]
    wide = np.asarray(values, np.float64)
    step = np.exp2(np.maximum(np.frexp(wide)[1], least) - digits)
    return torch.from_numpy(np.rint(wide / step) * step).to(getattr(torch, dtype))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit."""
    return (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and torch.equal(
        found.contiguous().reshape(-1).view(torch.uint8), wanted.contiguous().reshape(-1).view(torch.uint8)
    )
