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
OLDER = {
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 4, "vocab_size": 101},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 30},
    "gpt_bigcode": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 30},
    "gpt_neox": {name: size for name, size in SMALL.items() if name != "num_key_value_heads"},
    "opt": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "vocab_size": 101,
        "max_position_embeddings": 30,
        "word_embed_proj_dim": 32,
    },
}
MORE = {
    "gemma": {"head_dim": 20},
    "gemma2": {"head_dim": 20},
    "qwen3": {"head_dim": 20},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 5},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 5, "head_dim": 20, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 3},
    "olmoe": {"num_experts": 5},
}
# Each of them changes which weights there are, where the architecture has it at all.
SETTINGS = (
    {},
    {"attention_bias": True, "mlp_bias": True, "use_bias": True, "use_qkv_bias": True, "attention_out_bias": True},
    {"attention_bias": False, "use_bias": False, "qkv_bias": False, "multi_query": False, "enable_bias": False},
    {"head_dim": 20, "do_layer_norm_before": False},
)
# What transformers calls a tensor in memory, and checkpoints on the Hub another way.
IN_MEMORY = {"lm_head.weight": "embed_out.weight"}


def fields_of(model_type: str) -> dict[str, object]:
    own = OLDER.get(model_type) or {**SMALL, **MORE.get(model_type, {})}
    return {**own, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def parameters_in_transformers(model_type: str, config: object) -> dict[str, tuple[int, ...]]:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model_type in ("gpt2", "bloom"):
        return {name.removeprefix("transformer."): shape for name, shape in found.items()}
    return {IN_MEMORY.get(name, name) if model_type == "gpt_neox" else name: s for name, s in found.items()}


def is_expert(name: str) -> bool:
    """Experts are stacked in memory and single in checkpoints; everything else has the same name and shape."""
    return "experts." in name or "block_sparse_moe" in name or name.endswith("mlp.gate.weight")


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "biases", "no-biases", "head-size"])
@pytest.mark.parametrize("model_type", KNOWN)
def test_shapes_are_those_of_the_model_in_transformers(model_type: str, settings: dict[str, object]) -> None:
    import transformers

    default = transformers.AutoConfig.for_model(model_type)
    known = {name: value for name, value in settings.items() if hasattr(default, name)}
    config = transformers.AutoConfig.for_model(model_type, **{**fields_of(model_type), **known})
    expected = parameters_in_transformers(model_type, config)
    # A config.json has all fields, or, as transformers writes it, those that are not the defaults of its class.
    for stated in (config.to_dict(), {**config.to_diff_dict(), **fields_of(model_type)}):
        found = blueprint(stated)
        assert sum(map(math.prod, found.values())) == sum(map(math.prod, expected.values()))
        assert {name: shape for name, shape in found.items() if not is_expert(name)} == {
            name: shape for name, shape in expected.items() if not is_expert(name)
        }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", KNOWN)
def test_a_head_of_its_own_counts(model_type: str, tied: bool) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **fields_of(model_type), tie_word_embeddings=tied)
    expected = parameters_in_transformers(model_type, config)
    assert blueprint(config.to_dict()).keys() >= {name for name in expected if not is_expert(name)}
    assert sum(map(math.prod, blueprint(config.to_dict()).values())) == sum(map(math.prod, expected.values()))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
          "vocab_size": 50272, "max_position_embeddings": 2048}, 125_239_296),
        ({"model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8,
          "intermediate_size": 8192, "vocab_size": 50304}, 1_011_781_632),
        ({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880},
         559_214_592),
        ({"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
          "intermediate_size": 10240, "vocab_size": 51200}, 2_779_683_840),
        ({"model_type": "starcoder2", "hidden_size": 3072, "num_hidden_layers": 30, "num_attention_heads": 24,
          "num_key_value_heads": 2, "intermediate_size": 12288, "vocab_size": 49152}, 3_030_371_328),
        ({"model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4,
          "num_key_value_heads": 1, "intermediate_size": 6912, "vocab_size": 262144}, 999_885_952),
    ],
    ids=["opt-125m", "pythia-1b", "bloom-560m", "phi-2", "starcoder2-3b", "gemma-3-1b"],
)  # fmt: skip
def test_models_on_the_hub_have_as_many_parameters(config: dict[str, object], parameters: int) -> None:
    """Sizes that the Hub shows, from the headers of the models' own files."""
    assert sum(map(math.prod, blueprint(config).values())) == parameters


@pytest.mark.parametrize(("model_type", "field"), [("cohere", "use_qk_norm"), ("stablelm", "qk_layernorm")])
def test_a_setting_with_other_weights_is_refused_with_the_way_out(model_type: str, field: str) -> None:
    with pytest.raises(FormatError, match=f"{field}.*only headers are read"):
        blueprint({"model_type": model_type, **SMALL, field: True})


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
    with pytest.raises(FormatError, match="only headers are read"):
        blueprint({"model_type": model_type, **SMALL})
