"""A small base in three files, whose last no update touches, and an adapter for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import loraformat

HIDDEN, VOCABULARY, RANK = 16, 512, 2
FILES = tuple(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n"


def make(folder: Path) -> None:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    layers = [{f"model.layers.{n}.{name}.weight": draw(HIDDEN, HIDDEN) for name in LINEARS} for n in (0, 1)]
    groups: list[dict[str, Any]] = [
        {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), **layers[0]},
        layers[1],
        {"model.norm.weight": draw(HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)},
    ]
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    for name, group in zip(FILES, groups, strict=True):
        save_file(group, base / name, {"format": "pt"})
    weight_map = {name: file for file, group in zip(FILES, groups, strict=True) for name in group}
    total = sum(values.nbytes for group in groups for values in group.values())
    write(base / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    write(base / "config.json", {**named, **shape, "torch_dtype": "float32"})
    write(base / "tokenizer_config.json", {"model_max_length": 64})
    (base / "README.md").write_text(CARD)
    factors: dict[str, Any] = {}
    for layer in (0, 1):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            factors |= {f"{prefix}.lora_A.weight": draw(RANK, HIDDEN), f"{prefix}.lora_B.weight": draw(HIDDEN, RANK)}
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4, "bias": "none"}
    names = {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "acme/base"}
    write(adapter / "adapter_config.json", {**settings, **names})
    loraformat.merge(base, [adapter], folder / "merged")


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
