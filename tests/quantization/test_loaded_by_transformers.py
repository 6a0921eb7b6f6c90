"""transformers loads dense outputs: every weight is the one that was written, and the model runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantization.encoders import ENCODERS, MODULE
from quantization.models import once
from safetensors.torch import save_file

import loraformat

HIDDEN, INNER, VOCABULARY = 32, 64, 16
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["bitsandbytes NF4, double", "bitsandbytes INT8", "FP8, blocks of 8 x 16", "GPTQ, 4 bits", "AWQ", "ModelOpt NVFP4"],
)
def test_a_dense_output_is_loaded(tmp_path: Path, name: str) -> None:
    from transformers import LlamaForCausalLM

    base, seed = tmp_path / "b", 0
    base.mkdir()
    chance = torch.Generator().manual_seed(1)
    tensors = {
        f"{each}.weight": torch.randn(VOCABULARY, HIDDEN, generator=chance)
        for each in ("lm_head", "model.embed_tokens")
    }
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    wanted = {}
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
        for module, shape in SHAPES.items():
            seed += 1
            one = ENCODERS[name](np.random.default_rng(seed), *shape)
            path = f"model.layers.{layer}.{module}"
            tensors |= {key.replace(MODULE, path): value for key, value in one.tensors.items()}
            wanted[f"{path}.weight"] = once(one.values, one.dtype)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(
        json.dumps({**CONFIG, "torch_dtype": one.dtype, "quantization_config": one.settings})
    )
    loraformat.dequantize(str(base), str(tmp_path / "o"), verify="full")
    model, found = LlamaForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in wanted.items())
    assert torch.isfinite(model(torch.tensor([[1, 3, 5, 7]])).logits).all()
