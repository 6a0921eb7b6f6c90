"""demo: a small generated base and adapter, the commands to try on them, and a check of the result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.containers import open_bundle, save_bundle
from loraformat.formats.kit.folder import json_file, tensor_file
from loraformat.model.bundle import Bundle, File, Json, TensorFile
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.storage import stage

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_WIDTH, _HIDDEN, _LAYERS, _VOCABULARY, _NEW_WORDS, _RANK, _ALPHA = 64, 128, 2, 96, 4, 8, 16
_TARGETS = {
    "q_proj": (_WIDTH, _WIDTH),
    "k_proj": (_WIDTH, _WIDTH),
    "v_proj": (_WIDTH, _WIDTH),
    "o_proj": (_WIDTH, _WIDTH),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the demo.

    Attributes:
        says: what it shows.
        arguments: after `loraformat`.
        exit_code: what it must return.
    """

    says: str
    arguments: tuple[str, ...]
    exit_code: int = 0


def make_example(folder: str) -> None:
    """Write `base` (a Llama-shaped model, bfloat16) and `adapter` (a hand-written `.pt` folder without alpha).

    Both are random but seeded: the same bytes every time. The adapter changes four projections in each of two layers
    and brings embeddings with four new words.

    Raises: StorageError where `folder` cannot be written.
    """
    _save(os.path.join(folder, "base"), _base_files())
    _save(os.path.join(folder, "adapter"), _adapter_files())


def steps() -> tuple[Step, ...]:
    """The commands, in order, as they are typed in the folder that `make_example` filled."""
    alpha = ("--alpha", str(_ALPHA))
    return (
        Step("show its content", ("inspect", "adapter", "--base", "base", "--norms", *alpha)),
        Step("check it: its files do not state alpha, so its scale is unknown", ("validate", "adapter"), exit_code=1),
        Step("check it again with alpha, and against its base", ("validate", "adapter", "--base", "base", *alpha)),
        Step(
            "convert it to a PEFT adapter that names its base",
            ("convert", "adapter", "--to", "peft", *alpha, "--base-model", "me/tiny-llama", "-o", "adapter-peft"),
        ),
        Step("merge it into the base", ("merge", "base", "adapter-peft", "-o", "merged")),
    )


def compare(folder: str = ".") -> str:
    """Recompute the merge in float64 from the files that the demo made, compare, and say what was found.

    Raises: AssertionError where the merged model is not base + scale · up @ down, rounded once.
    """
    import numpy as np

    base, merged = (_tensors(os.path.join(folder, name), "model.safetensors") for name in ("base", "merged"))
    factors = _tensors(os.path.join(folder, "adapter"), "lora_weights.pt")
    tables = _tensors(os.path.join(folder, "adapter"), "embedding_weights.pt")
    touched = 0
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        expected = weight.load().astype(np.float64)
        if f"{module}.lora_A" in factors:
            down, up = (factors[f"{module}.{which}"].load().astype(np.float64) for which in ("lora_A", "lora_B"))
            expected = expected + _ALPHA / _RANK * (up @ down)
            touched += 1
        elif name in tables:
            expected = tables[name].load().astype(np.float64)
            touched += 1
        # Rounding to bfloat16 loses at most half a unit in the last place, 2⁻⁹ of the value.
        gap = abs(merged[name].load() - expected)
        assert bool((gap <= 2.0**-8 * abs(expected) + 1e-9).all()), name
        assert np.isfinite(merged[name].load()).all(), name
    untouched = len(base) - touched
    return f"{touched} of {len(base)} tensors changed, as computed in float64; the other {untouched} are unchanged"


def _tensors(folder: str, name: str) -> Mapping[str, LazyTensor]:
    return open_bundle(folder).tensors(name).entries


def _base_files() -> dict[str, File]:
    drawn = _Drawn(seed=1)

    def random(*shape: int) -> LazyTensor:
        return LazyTensor.of(rounded(drawn.normal(*shape) * 0.02, DType.BF16), DType.BF16)

    tensors = {"model.embed_tokens.weight": random(_VOCABULARY, _WIDTH), "model.norm.weight": random(_WIDTH)}
    for layer in range(_LAYERS):
        for name, shape in _TARGETS.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = random(*shape)
        for name, shape in {
            "gate_proj": (_HIDDEN, _WIDTH),
            "up_proj": (_HIDDEN, _WIDTH),
            "down_proj": (_WIDTH, _HIDDEN),
        }.items():
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = random(_WIDTH)
    config: dict[str, Json] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _WIDTH,
        "intermediate_size": _HIDDEN,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": _VOCABULARY,
    }
    return {
        "config.json": json_file("config.json", config),
        "model.safetensors": _weights("model.safetensors", "safetensors", tensors),
        "tokenizer.json": json_file("tokenizer.json", _words(_VOCABULARY)),
    }


def _adapter_files() -> dict[str, File]:
    drawn = _Drawn(seed=2)

    def random(deviation: float, *shape: int) -> LazyTensor:
        return LazyTensor.of(rounded(drawn.normal(*shape) * deviation, DType.F32))

    factors: dict[str, LazyTensor] = {}
    for layer in range(_LAYERS):
        for name, (rows, columns) in _TARGETS.items():
            module = f"model.layers.{layer}.self_attn.{name}"
            factors[f"{module}.lora_A"] = random(0.05, _RANK, columns)
            factors[f"{module}.lora_B"] = random(0.01, rows, _RANK)
    rows = _VOCABULARY + _NEW_WORDS
    table = random(0.02, rows, _WIDTH)
    config: dict[str, Json] = {
        "method": "lora",
        "rank": _RANK,
        "target_modules": list(_TARGETS),
        "vocab_size": rows,
    }
    return {
        "embedding_weights.pt": _weights("embedding_weights.pt", "torch", {"model.embed_tokens.weight": table}),
        "lora_config.json": json_file("lora_config.json", config),
        "lora_weights.pt": _weights("lora_weights.pt", "torch", factors),
        "tokenizer.json": json_file("tokenizer.json", _words(rows)),
    }


class _Drawn:
    """A source of numbers that are the same on every machine: exact sums of integers, near a normal distribution."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._generator = np.random.Generator(np.random.Philox(seed))

    def normal(self, *shape: int) -> Floats:
        """Mean 0 and deviation 1: the sum of twelve uniform numbers, less six."""
        bits = self._generator.integers(0, 1 << 32, (12, *shape), dtype="u8")
        found: Floats = bits.sum(axis=0) / 2.0**32 - 6.0
        return found


def _words(count: int) -> dict[str, Json]:
    words = [f"word{number}" for number in range(count)]
    by_index: dict[str, Json] = {str(number): word for number, word in enumerate(words)}
    return {"idx_to_word": by_index, "vocab_size": count, "word_to_idx": {w: n for n, w in enumerate(words)}}


def _weights(name: str, container: str, tensors: Mapping[str, LazyTensor]) -> TensorFile:
    return tensor_file(name, container, tensors)


def _save(target: str, files: Mapping[str, File]) -> None:
    with stage(target, overwrite=False) as store:
        save_bundle(Bundle("", files), store)
