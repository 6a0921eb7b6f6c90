"""LitGPT itself merges what is written for it: the logits are those of the adapter in PEFT."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import adapted, build

from loraformat.jobs.convert import convert

pytest.importorskip("litgpt.lora", reason="litgpt is not installed: make test-engines")

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ATTENTION = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", GROUPED, {"target_modules": ATTENTION}),
    "llama-all": ("Llama", {**GROUPED, "rope_parameters": SCALED}, {"target_modules": ALL}),
    "llama-patterns": (
        "Llama",
        GROUPED,
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}, "use_rslora": True},
    ),
    "llama-one-layer": ("Llama", GROUPED, {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 3}, {"target_modules": ["gate_proj", "k_proj"]}),
    "qwen2": ("Qwen2", GROUPED, {"target_modules": ATTENTION}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 6}, {"target_modules": ALL}),
    "pythia": (
        "GPTNeoX",
        {**SIZES, "rotary_pct": 0.5, "tie_word_embeddings": False},
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
}


def litgpt_weights(config: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base under LitGPT's names, by its own code."""
    from litgpt.scripts import convert_hf_checkpoint as script

    state: dict[str, torch.Tensor] = {}
    name = config.name.lower()
    if name.startswith("pythia"):
        script.copy_weights_gpt_neox(config, state, weights)
        return state
    copies = {
        "qwen2.5": partial(script.copy_weights_qwen_2_5, config, {}),
        "qwen3": partial(script.copy_weights_qwen_3, config, {}),
    }
    copy = next((each for start, each in copies.items() if name.startswith(start)), None)
    (copy or partial(script.copy_weights_hf_llama, config, {}))(state, weights)
    return state


@pytest.mark.parametrize("case", CASES)
def test_its_merge_of_our_folder_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    from litgpt.model import GPT, Config
    from litgpt.scripts.merge_lora import merge_lora

    name, settings, lora = CASES[case]
    model = build(f"{name}ForCausalLM", f"{name}Config", settings)
    model.save_pretrained(tmp_path / "base")
    both = adapted(model, tmp_path / "adapter", **lora)
    out = tmp_path / "out"
    convert(str(tmp_path / "adapter"), str(out), to="litgpt", base=str(tmp_path / "base"), check_roundtrip=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_text("{}")
    stated = yaml.safe_load((out / "model_config.yaml").read_text())
    config = Config(**stated)
    lit = tmp_path / "checkpoints" / "base"
    lit.mkdir(parents=True)
    bare = build(f"{name}ForCausalLM", f"{name}Config", settings)
    torch.save(litgpt_weights(config, load_file(tmp_path / "base" / "model.safetensors")), lit / "lit_model.pth")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (lit / file).write_text("{}")
    (lit / "model_config.yaml").write_text((out / "model_config.yaml").read_text())
    merge_lora(out, pretrained_checkpoint_dir=lit)
    net = GPT(config)
    net.load_state_dict(torch.load(out / "lit_model.pth"))
    tokens = torch.tensor([[1, 5, 9, 30, 7, 7, 2, 11]])
    with torch.no_grad():
        wanted, found = both(input_ids=tokens).logits, net(tokens)
        unchanged = bare(input_ids=tokens).logits
    assert (wanted - unchanged).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
