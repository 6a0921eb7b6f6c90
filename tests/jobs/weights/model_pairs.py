"""Checkpoints on disk for the verbs between models and adapters: small Llamas, and fine-tunings of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(**fields: Any) -> Tensors:
    """The tensors of a small random Llama, as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, **fields}))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None, **fields: Any) -> Path:
    """A folder with one safetensors file and a config.json."""
    folder.mkdir()
    kept = {name: value.to(dtype or value.dtype).contiguous() for name, value in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    return folder


def tuned(tensors: Mapping[str, torch.Tensor], change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Tensors:
    """The tensors after a change of some."""
    found = {}
    for name, value in tensors.items():
        new = change(name, value)
        found[name] = value if new is None else new
    return found


def low_rank(rank: int, size: float = 0.05, ends: tuple[str, ...] = ("_proj.weight",)) -> Any:
    """A change of a rank of the weights whose names end so."""
    g = torch.Generator().manual_seed(1)

    def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
        if not name.endswith(ends):
            return None
        rows, cols = value.shape
        return value + size * torch.randn(rows, rank, generator=g) @ torch.randn(rank, cols, generator=g)

    return change


def read(folder: Path | str) -> Tensors:
    """All tensors of a folder."""
    return {
        name: value for file in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(file).items()
    }


def model_of(folder: Path) -> Any:
    """The model of a folder, as transformers loads it."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """What a model answers to a fixed input."""
    ids = torch.arange(24).reshape(2, 12) * 3 % 96
    with torch.no_grad():
        return model(input_ids=ids).logits
