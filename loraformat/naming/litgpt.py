"""Names of LitGPT's weights in Hugging Face checkpoints, by model family.

Source: litgpt 0.5.13, litgpt/scripts/convert_lit_checkpoint.py `convert_lit_checkpoint`, `copy_weights_*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"transformer\.h\.(\d{1,9})\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,9})\.(fc_1|fc_2|proj)")


@dataclass(frozen=True, slots=True)
class Family:
    """The names of one model family.

    Attributes:
        layers: path of the list of layers.
        modules: path inside a layer, LitGPT's → the checkpoint's.
        joined: path of the weight that holds query, key and value in one, or "" where they are apart.
        is_interleaved: whether `joined` holds them group by group rather than one after the other.
        gate_up: path of the weight that holds `mlp.fc_1` above `mlp.fc_2`, or "".
        experts: path and names of `fc_1`, `fc_2`, `proj` of an expert, or ().
        head: of `lm_head`.
    """

    layers: str
    modules: Mapping[str, str]
    joined: str = ""
    is_interleaved: bool = False
    gate_up: str = ""
    experts: tuple[str, ...] = ()
    head: str = "lm_head"

    def module(self, name: str) -> str | None:
        """The checkpoint's path of a module that stands for one weight, or None."""
        if name == "lm_head":
            return self.head
        found = _LAYER.fullmatch(name)
        if found is None:
            return None
        layer, path = f"{self.layers}.{found[1]}", found[2]
        expert = _EXPERT.fullmatch(path)
        if expert is not None:
            return self._expert(layer, expert[1], expert[2])
        return f"{layer}.{self.modules[path]}" if path in self.modules else None

    def _expert(self, layer: str, number: str, part: str) -> str | None:
        if not self.experts:
            return None
        names = dict(zip(("fc_1", "fc_2", "proj"), self.experts[1:], strict=True))
        return f"{layer}.{self.experts[0]}.{number}.{names[part]}"


_LLAMA = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "mlp.gate": "block_sparse_moe.gate",
}
LLAMA = Family("model.layers", _LLAMA, experts=("block_sparse_moe.experts", "w1", "w3", "w2"))
QWEN3 = Family(
    "model.layers",
    {**_LLAMA, "mlp.gate": "mlp.gate"},
    experts=("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)
PHI = Family(
    "model.layers",
    {**_LLAMA, "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
)
PHI3 = Family(
    "model.layers",
    {"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"},
    joined="self_attn.qkv_proj",
    gate_up="mlp.gate_up_proj",
)
FALCON = Family(
    "transformer.h",
    {"attn.proj": "self_attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    joined="self_attention.query_key_value",
    is_interleaved=True,
)
NEOX = Family(
    "gpt_neox.layers",
    {"attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    joined="attention.query_key_value",
    is_interleaved=True,
    head="embed_out",
)


def family_of(name: str, mlp_class: str) -> Family:
    """The family of a model, by the `name` and `mlp_class_name` of its model_config.yaml, as LitGPT chooses it."""
    lower = name.lower()
    if lower.startswith("falcon"):
        return FALCON
    if lower.startswith(("phi-3", "phi-4")):
        return PHI3
    if lower.startswith("phi"):
        return PHI
    if lower.startswith("qwen3"):
        return QWEN3
    if lower.startswith(("gemma-2", "gemma-3", "qwen2.5", "qwq", "olmo-2-")):
        return LLAMA
    return LLAMA if mlp_class in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE") else NEOX
