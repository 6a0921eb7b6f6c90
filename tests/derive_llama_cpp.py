"""Makes loraformat/naming/llama_cpp_names.json: llama.cpp's names for the weights of transformers' classes.

Names come from the table of the gguf package, for the modules that each class has when it is built; which classes have
permuted rows, and what experts are called, from llama.cpp's converter. Run as a script it writes the file.

Source: gguf 0.19.0, tensor_mapping.py; llama.cpp of llama_cpp_python 0.3.36, conversion/{llama,qwen,gemma,phi,granite,
olmo,command_r,starcoder,stablelm}.py.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "loraformat" / "naming" / "llama_cpp_names.json"

_MIXTRAL = ("block_sparse_moe.experts.{}.", {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"})
_QWEN = (
    "mlp.experts.{}.",
    {"gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps"},
)


@dataclass(frozen=True)
class Family:
    """What the converter does with a class beside renaming.

    Attributes:
        architecture: llama.cpp's word.
        permuted: whether rows of q and k stand in another order.
        experts: where one expert's matrices stand in a layer, and the stacks that they become.
        routers: names of the router in checkpoints, where the class has another one.
    """

    architecture: str
    permuted: bool = False
    experts: tuple[str, dict[str, str]] | None = None
    routers: tuple[str, ...] = ()


FAMILIES = {
    "LlamaForCausalLM": Family("llama", permuted=True),
    "MistralForCausalLM": Family("llama", permuted=True),
    "MixtralForCausalLM": Family("llama", permuted=True, experts=_MIXTRAL, routers=("block_sparse_moe.gate",)),
    "SmolLM3ForCausalLM": Family("smollm3", permuted=True),
    "ArceeForCausalLM": Family("arcee", permuted=True),
    "GraniteForCausalLM": Family("granite", permuted=True),
    "OlmoForCausalLM": Family("olmo", permuted=True),
    "Olmo2ForCausalLM": Family("olmo2"),
    "OlmoeForCausalLM": Family("olmoe", experts=_QWEN),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen2MoeForCausalLM": Family("qwen2moe", experts=_QWEN),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", experts=_QWEN),
    "GemmaForCausalLM": Family("gemma"),
    "Gemma2ForCausalLM": Family("gemma2"),
    "Gemma3ForCausalLM": Family("gemma3"),
    "Phi3ForCausalLM": Family("phi3"),
    "CohereForCausalLM": Family("command-r"),
    "Cohere2ForCausalLM": Family("cohere2"),
    "StableLmForCausalLM": Family("stablelm"),
    "Starcoder2ForCausalLM": Family("starcoder2"),
}


def modules_of(name: str) -> tuple[str, list[str]]:
    """(`model_type`, modules with a weight, of the first layer) of a class that is built without values."""
    import torch
    import transformers

    model: Any = getattr(transformers, name)
    config = model.config_class(num_hidden_layers=1)
    with torch.device("meta"):
        built = model(config)
    weights = [key.removesuffix(".weight") for key, _ in built.named_parameters() if key.endswith(".weight")]
    return config.model_type, list(dict.fromkeys([*weights, "lm_head"]))


def names_of(name: str, family: Family) -> tuple[str, dict[str, str]]:
    """(`model_type`, module in transformers → tensor in llama.cpp), with {} for the layer and for the expert."""
    import gguf

    architecture = next(key for key, one in gguf.MODEL_ARCH_NAMES.items() if one == family.architecture)
    table = gguf.get_tensor_name_map(architecture, 1)
    kind, modules = modules_of(name)
    found = {}
    for module in (*modules, *(f"model.layers.0.{one}" for one in family.routers)):
        tensor = table.get_name(module)
        if tensor is not None:
            found[re.sub(r"\.0\.", ".{}.", module, count=1)] = re.sub(r"\.0\.", ".{}.", tensor, count=1)
    if family.experts is not None:
        place, stacks = family.experts
        found |= {f"model.layers.{{}}.{place}{leaf}": f"blk.{{}}.{stack}" for leaf, stack in stacks.items()}
    return kind, dict(sorted(found.items()))


def table() -> dict[str, object]:
    """What the file holds."""
    import importlib.metadata

    import gguf

    assert gguf is not None
    classes = {}
    for name, family in FAMILIES.items():
        kind, names = names_of(name, family)
        classes[name] = {
            "architecture": family.architecture,
            "model_type": kind,
            "permuted": family.permuted,
            "names": names,
        }
    return {"gguf": importlib.metadata.version("gguf"), "classes": classes}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(json.dumps(table(), indent=0) + "\n", encoding="utf-8")
