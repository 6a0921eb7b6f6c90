"""Bases and adapters for merger tests: written by safetensors and torch themselves, read back by them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.merger import (
    AdapterSource,
    Inputs,
    Resources,
    Written,
    as_written,
    plan_merge,
    write_others,
    write_weights,
)
from loraformat.merger.verify import check_output
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Update
from loraformat.storage import stage


def weights(seed: int = 0, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> dict[str, Tensor]:
    """A model of two blocks in Llama's spelling: hidden 24, vocabulary 70 (more than a tile)."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(70, 24, generator=g)}
    for layer in range(2):
        for name, shape in {"q_proj": (24, 24), "up_proj": (130, 24), "down_proj": (24, 130)}.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(*shape, generator=g)
        tensors[f"model.layers.{layer}.norm.weight"] = torch.randn(24, generator=g)
    if not tied:
        tensors["lm_head.weight"] = torch.randn(70, 24, generator=g)
    return {name: value.to(dtype) for name, value in tensors.items()}


def config(*, tied: bool = False, **more: object) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 70,
        "tie_word_embeddings": tied,
        **more,
    }


def save_base(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], *, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"of": "the base"}')
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total, "kept": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapter_folder(
    folder: Path, shapes: dict[str, tuple[int, ...]], rank: int = 3, scale: float = 1.0, seed: int = 3
) -> Path:
    """A LoRA as PEFT saves it, for base weights of the given shapes."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, cols) in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, cols, generator=g)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in shapes})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "x"}))
    return folder


def low_rank(rows: int, cols: int, *, rank: int = 3, scale: float = 0.5, seed: int = 5) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=g), torch.randn(rank, cols, generator=g)
    return LowRank(LazyTensor.of(up), LazyTensor.of(down), scale)


def adapter(updates: Mapping[str, Sequence[Update] | Update], **settings: object) -> Adapter:
    chains = {name: tuple(found) if isinstance(found, Sequence) else (found,) for name, found in updates.items()}
    return Adapter(config=AdapterConfig(**settings), updates=dict(sorted(chains.items())))


def merge(
    base: Path,
    out: Path,
    *adapters: Adapter,
    jobs: int = 1,
    memory_nbytes: int = 1 << 24,
    container: str | None = None,
) -> Path:
    merge_and_tell(base, out, *adapters, jobs=jobs, memory_nbytes=memory_nbytes, container=container)
    return out


def merge_and_tell(
    base: Path,
    out: Path,
    *adapters: Adapter,
    jobs: int = 1,
    memory_nbytes: int = 1 << 24,
    strengths: Sequence[float] = (),
    **planned: object,
) -> Written:
    """A merge without the job around it, compared with the reference: the files, and what is known of them."""
    checkpoint = as_written(open_checkpoint(str(base)), adapters)
    factors = strengths or [1.0] * len(adapters)
    sources = [AdapterSource("memory", "none", strength=factor) for factor in factors]
    plan = plan_merge(checkpoint, adapters, sources, **planned)
    inputs = Inputs(base=checkpoint, adapters=adapters)
    with stage(str(out), overwrite=False, inputs=[str(base)]) as output:
        write_others(plan, inputs, output)
        written = write_weights(plan, inputs, output, Resources(jobs=jobs, memory_nbytes=memory_nbytes))
        check_output(plan, inputs, output, full=True, digests=written.digests)
        return written


def load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
