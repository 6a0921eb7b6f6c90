"""LitGPT itself: its files are read to the updates that its own merge and export give."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracle import dense
from torch import Tensor

from loraformat.io import load_adapter

lora = pytest.importorskip("litgpt.lora", reason="litgpt is not installed")

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SIZES: dict[str, Any] = {"block_size": 8, "vocab_size": 32, "padded_vocab_size": 32, "n_layer": 2, "n_embd": 16}
LLAMA: dict[str, Any] = {
    "name": "tiny-llama",
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "n_head": 4,
    "n_query_groups": 2,
    "head_size": 6,
    "intermediate_size": 20,
}
NEOX: dict[str, Any] = {"name": "pythia-tiny", "mlp_class_name": "GptNeoxMLP", "n_head": 4, "n_query_groups": 4}
FALCON: dict[str, Any] = {
    "name": "falcon-7b-tiny",
    "mlp_class_name": "GptNeoxMLP",
    "n_head": 4,
    "n_query_groups": 2,
    "bias": False,
    "shared_attention_norm": True,
    "parallel_residual": True,
}
PHI: dict[str, Any] = {"name": "phi-2", "mlp_class_name": "GptNeoxMLP", "n_head": 4, "shared_attention_norm": True}
PHI3: dict[str, Any] = {**LLAMA, "name": "Phi-3-tiny"}
QWEN3: dict[str, Any] = {**LLAMA, "name": "Qwen3-tiny", "norm_qk": True}

FLAGS = ("query", "key", "value", "projection", "mlp", "head")
CASES = {
    "llama-qv": (LLAMA, "query value"),
    "llama-all": (LLAMA, "query key value projection mlp head"),
    "llama-k": (LLAMA, "key"),
    "pythia-qkv": (NEOX, "query key value projection mlp"),
    "pythia-qv": (NEOX, "query value head"),
    "falcon-qv": (FALCON, "query value projection"),
    "phi-qv": (PHI, "query value mlp projection"),
    "phi3-qv": (PHI3, "query value mlp projection"),
    "qwen3": (QWEN3, "query key value mlp"),
}


def exported(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Under the names of the Hugging Face checkpoint, by LitGPT's own code."""
    from litgpt.scripts import convert_lit_checkpoint as script

    name, result = config.name.lower(), {}
    if name.startswith("falcon"):
        script.copy_weights_falcon(config, result, weights)
    elif name.startswith("phi"):
        script.copy_weights_phi(config, result, weights)
    elif name.startswith("qwen3"):
        script.copy_weights_qwen_3(config, result, weights)
    elif config.mlp_class_name == "LLaMAMLP":
        script.copy_weights_llama(config, result, weights)
    else:
        script.copy_weights_gpt_neox(config, result, weights)
    return result


@pytest.mark.parametrize("case", CASES)
def test_its_folder_becomes_the_updates_of_its_own_merge(case: str, tmp_path: Path) -> None:
    sizes, adapted = CASES[case]
    flags = {f"lora_{flag}": flag in adapted.split() for flag in FLAGS}
    config = lora.Config(**SIZES, **sizes, lora_r=2, lora_alpha=5, **flags)
    torch.manual_seed(0)
    net = lora.GPT(config)
    for name, parameter in net.named_parameters():
        parameter.data = torch.randn_like(parameter) if "lora_" in name else torch.zeros_like(parameter)
    state = {name: value for name, value in net.state_dict().items() if lora.lora_filter(name, value)}
    torch.save({"model": state}, tmp_path / "lit_model.pth.lora")
    stated = {"checkpoint_dir": "checkpoints/tiny", "lora_r": 2, "lora_alpha": 5, "lora_dropout": 0.05, **flags}
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(stated))
    kept = {name: value for name, value in asdict(config).items() if not name.startswith("lora_")}
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(kept))
    lora.merge_lora_weights(net)
    merged = {
        name.replace("linear.", ""): value
        for name, value in net.state_dict().items()
        if not lora.lora_filter(name, value)
    }
    wanted = {name: value for name, value in exported(merged, config).items() if bool(value.any())}
    adapter = load_adapter(str(tmp_path))
    assert sorted(adapter.updates) == sorted(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(dense(adapter.updates[name][0]), value.double(), rtol=1e-5, atol=1e-5)
    assert not adapter.unclaimed
    assert not adapter.notes
