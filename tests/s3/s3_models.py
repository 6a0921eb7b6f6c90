"""A base of two files, an adapter that changes one tensor in the middle of the first, and their merge."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

import loraformat

HIDDEN, RANK = 512, 4
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EDITED = "model.layers.0.self_attn.q_proj.weight"
# 6 MiB before the edited half and 7 MiB after it; the second file is not touched.
TENSORS = {
    FILES[0]: {
        "model.embed_tokens.weight": (6144, HIDDEN),
        EDITED: (HIDDEN, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (7168, HIDDEN),
    },
    FILES[1]: {"lm_head.weight": (9216, HIDDEN), "model.norm.weight": (HIDDEN,)},
}


def make_models(folder: Path) -> None:
    rng = np.random.default_rng(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    places = {}
    for file, tensors in TENSORS.items():
        values = {name: ("BF16", _bf16(rng.standard_normal(shape) * 0.02)) for name, shape in tensors.items()}
        save(base / file, values)
        places |= dict.fromkeys(tensors, file)
    config = {"model_type": "llama", "hidden_size": HIDDEN, "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    index = {"metadata": {"total_size": sum(map(nbytes_of, TENSORS.values()))}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "tokenizer_config.json").write_text("{}")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{prefix}.lora_A.weight": ("F32", (rng.standard_normal((RANK, HIDDEN)) * 0.1).astype(np.float32)),
        f"{prefix}.lora_B.weight": ("F32", (rng.standard_normal((HIDDEN, RANK)) * 0.1).astype(np.float32)),
    }
    save(adapter / "adapter_model.safetensors", factors)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "test/base"}))
    loraformat.merge(base, [adapter], folder / "out")


def nbytes_of(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in tensors.values())


def save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file, made without the package under test."""
    head, at = {}, 0
    for name, (dtype, values) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    data = b"".join(values.tobytes() for _, values in tensors.values())
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def expected(models: Path) -> dict[str, bytes]:
    """The merge on this machine; without digests of copies, which a store does not read."""
    return {
        path.name: path.read_bytes() for path in (models / "out").iterdir() if path.name != "loraformat.digests.json"
    }


def make_large(folder: Path) -> int:
    """A base of one file in which 12 MiB change between 12 MiB and 12 MiB that do not; the changed bytes."""
    layers = [f"model.layers.0.self_attn.{name}_proj.weight" for name in ("q", "k", "v")]
    shapes = {"model.embed_tokens.weight": (6144, 1024), **dict.fromkeys(layers, (2048, 1024))}
    _make_one_file(folder, {**shapes, "model.layers.0.mlp.up_proj.weight": (6144, 1024)}, layers)
    return 3 * 2 * 2048 * 1024


def make_wide(folder: Path) -> None:
    """A base of one file of 130 MB, all of which changes."""
    layers = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(4)]
    _make_one_file(folder, dict.fromkeys(layers, (4096, 4096)), layers)


def _make_one_file(folder: Path, shapes: dict[str, tuple[int, int]], edited: list[str]) -> None:
    rng = np.random.default_rng(1)
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    values = {name: ("BF16", _bf16(rng.random(shape, dtype=np.float32))) for name, shape in shapes.items()}
    save(folder / "base" / "model.safetensors", values)
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    factors = {}
    for name in edited:
        rows, columns = shapes[name]
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{prefix}.lora_A.weight"] = ("F32", rng.random((RANK, columns), dtype=np.float32))
        factors[f"{prefix}.lora_B.weight"] = ("F32", rng.random((rows, RANK), dtype=np.float32))
    save(folder / "adapter" / "adapter_model.safetensors", factors)
    targets = sorted({name.split(".")[-2] for name in edited})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
