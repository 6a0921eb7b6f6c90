"""Shapes from config.json against the parameters of the model that transformers builds from it."""

from __future__ import annotations

import math

import pytest
import torch

from loraformat.errors import ConfigError, FormatError
from loraformat.model.blueprints import KNOWN, blueprint

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 101,
}
MORE = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 30},
    "gemma": {"head_dim": 20},
    "gemma2": {"head_dim": 20},
    "qwen3": {"head_dim": 20},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 5},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 5, "head_dim": 20, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 3},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", KNOWN)
def test_shapes_are_those_of_the_model_in_transformers(model_type: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {**(SMALL if model_type != "gpt2" else {}), **MORE.get(model_type, {}), "tie_word_embeddings": tied}
    if model_type == "gpt2":
        fields["tie_word_embeddings"] = True
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}
    found = blueprint(config.to_dict())
    assert sum(map(math.prod, found.values())) == sum(map(math.prod, expected.values()))
    # Experts are stacked in memory and single in checkpoints; everything else has the same name and shape.
    apart = {name for name in found if "experts." in name or "block_sparse_moe" in name}
    together = {name for name in expected if "experts." in name or name.endswith("mlp.gate.weight")}
    assert {k: v for k, v in found.items() if k not in apart and not k.endswith("mlp.gate.weight")} == {
        k: v for k, v in expected.items() if k not in together
    }


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
@pytest.mark.parametrize("value", [None, 0, -3, 2.5, True, "4096", 1 << 40])
def test_a_field_that_is_no_size_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        blueprint({"model_type": "llama", **SMALL, field: value})


def test_too_many_weights_are_refused_before_they_are_listed() -> None:
    huge = {"model_type": "mixtral", **SMALL, "num_hidden_layers": 1 << 30, "num_local_experts": 1 << 30}
    with pytest.raises(ConfigError, match="more weights"):
        blueprint(huge)


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", ["llama"]])
def test_an_architecture_that_is_not_known_is_refused_with_the_way_out(model_type: object) -> None:
    with pytest.raises(FormatError, match="headers are enough"):
        blueprint({"model_type": model_type, **SMALL})
