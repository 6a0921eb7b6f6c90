"""LitGPT's model_config.yaml of a base, out of its config.json.

Source: litgpt 0.5.13, litgpt/config.py `Config` and its tables of models; litgpt/model.py `build_rope_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraformat.diagnostics import in_file, show
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats.kit.fields import as_integer, as_object, optional_boolean, optional_number, optional_text
from loraformat.model.bundle import Json
from loraformat.naming import heads_of, levels_of

_CONFIG = "config.json"
_MOST = 1 << 30
_MOST_LAYERS = 1 << 12
# Settings of config.json that LitGPT's blocks of these models have no counterpart of, and what they must be.
_FIXED: Mapping[str, Mapping[str, tuple[Json, ...]]] = {
    "llama": {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu")},
    "mistral": {"hidden_act": (None, "silu")},
    "qwen2": {"use_sliding_window": (None, False), "hidden_act": (None, "silu")},
    "qwen3": {
        "attention_bias": (None, False),
        "use_sliding_window": (None, False),
        "hidden_act": (None, "silu"),
    },
    "gpt_neox": {"attention_bias": (None, True), "hidden_act": (None, "gelu")},
}
# How LitGPT's own names of these models begin: by them it chooses how it exports to Hugging Face's names.
_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2.5", "qwen3": "Qwen3", "gpt_neox": "pythia"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors of a model's LoRA are as long as: numbers of values, and of layers."""

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int


def sizes_of(config: Mapping[str, Json]) -> Sizes:
    """The sizes that config.json states. Raises ConfigError (LF103): one is missing or is not a positive integer."""
    return Sizes(
        hidden=_count(config, "hidden_size"),
        intermediate=_count(config, "intermediate_size"),
        vocabulary=_count(config, "vocab_size"),
        layers=as_integer(config.get("num_hidden_layers"), in_file(_CONFIG, "num_hidden_layers"), 1, _MOST_LAYERS),
    )


def model_config(config: Mapping[str, Json], base_model: str | None) -> dict[str, Json]:
    """The settings under which LitGPT builds the model of config.json.

    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    >>> made = model_config({"model_type": "llama", "num_hidden_layers": 1, **sizes}, "meta-llama/Llama-3.2-1B")
    >>> made["name"], made["n_query_groups"], made["mlp_class_name"]
    ('Llama-3.2-1B', 2, 'LLaMAMLP')

    Args:
        base_model: as the Hub has it, or None.

    Raises:
        UnsupportedUpdate (LF013): a model, or a setting of it, of which LitGPT's settings are not known.
        ConfigError (LF103): a setting that cannot be used.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _NAMES:
        known = ", ".join(sorted(_NAMES))
        what = "no model_type" if kind is None else f"model_type {show(kind, 40)}"
        raise UnsupportedUpdate(
            f"a base of {what}: LitGPT's settings are known only for {known}", where=in_file(_CONFIG, "model_type")
        )
    for field, expected in _FIXED[kind].items():
        if config.get(field) not in expected:
            found = show(config.get(field), 40)
            raise UnsupportedUpdate(
                f"a base with {field} {found}, which LitGPT's settings cannot express", where=in_file(_CONFIG, field)
            )
    heads, sizes = heads_of(config), sizes_of(config)
    return {
        **_named(kind, base_model),
        **_LAYERS[kind](config),
        **_rope(config),
        "block_size": _count(config, "max_position_embeddings", 2048),
        "head_size": heads.size,
        "intermediate_size": sizes.intermediate,
        "n_embd": sizes.hidden,
        "n_head": heads.query,
        "n_layer": sizes.layers,
        "n_query_groups": heads.key,
        "padded_vocab_size": sizes.vocabulary,
        "vocab_size": sizes.vocabulary,
    }


def config_of(configs: Mapping[str, Json]) -> Mapping[str, Json]:
    """The level of config.json that has the language model."""
    return next((level for _, level in levels_of(configs) if "num_attention_heads" in level), configs)


def _named(kind: str, base_model: str | None) -> dict[str, Json]:
    start = _NAMES[kind]
    owner, _, name = (base_model or "").rpartition("/")
    own = name if name.lower().startswith(start.lower()) else start
    is_on_hub = bool(owner) and owner.count("/") == 0 and owner not in (".", "..", "~")
    return {"name": own, "hf_config": {"org": owner, "name": name} if is_on_hub else {}}


def _llama(config: Mapping[str, Json]) -> dict[str, Json]:
    return {
        "attn_bias": config.get("model_type") == "qwen2",
        "bias": False,
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "norm_eps": _number(config, "rms_norm_eps", 1e-6),
        "norm_qk": config.get("model_type") == "qwen3",
        "parallel_residual": False,
        "rotary_percentage": 1.0,
    }


def _mistral(config: Mapping[str, Json]) -> dict[str, Json]:
    # transformers fills in 4096 where the field is absent; null stands for none.
    window = config.get("sliding_window", 4096)
    settings = _llama(config)
    return settings if window is None else {**settings, "sliding_window_size": _count(config, "sliding_window", 4096)}


def _neox(config: Mapping[str, Json]) -> dict[str, Json]:
    nested = as_object(config.get("rope_parameters") or {}, in_file(_CONFIG, "rope_parameters"))
    share = optional_number(nested, "partial_rotary_factor", _CONFIG)
    parallel = optional_boolean(config, "use_parallel_residual", _CONFIG)
    return {
        "bias": True,
        "mlp_class_name": "GptNeoxMLP",
        "norm_class_name": "LayerNorm",
        "norm_eps": _number(config, "layer_norm_eps", 1e-5),
        "parallel_residual": True if parallel is None else parallel,
        "rotary_percentage": _number(config, "rotary_pct", 0.25 if share is None else share),
    }


_LAYERS: Mapping[str, Callable[[Mapping[str, Json]], dict[str, Json]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt_neox": _neox,
}


def _rope(config: Mapping[str, Json]) -> dict[str, Json]:
    """Rotary embeddings: transformers 5 has all in `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    stated = as_object(config.get(name) or {}, in_file(_CONFIG, name))
    base = _number({**config, **stated}, "rope_theta", _number(config, "rotary_emb_base", 10000.0))
    kind = optional_text(stated, "rope_type", _CONFIG) or optional_text(stated, "type", _CONFIG) or "default"
    settings: dict[str, Json] = {"rope_base": int(base) if base == int(base) else base}
    if kind == "default":
        return settings
    if kind == "linear":
        return {**settings, "rope_condense_ratio": _number(stated, "factor", 1.0)}
    if kind != "llama3":
        raise UnsupportedUpdate(
            f"a base with {name} of the type {show(kind, 40)}, which LitGPT's settings cannot express",
            where=in_file(_CONFIG, name),
        )
    adjusted: dict[str, Json] = {
        "factor": _number(stated, "factor"),
        "high_freq_factor": _number(stated, "high_freq_factor"),
        "low_freq_factor": _number(stated, "low_freq_factor"),
        "original_max_seq_len": _count(stated, "original_max_position_embeddings"),
    }
    return {**settings, "rope_adjustments": adjusted}


def _count(config: Mapping[str, Json], field: str, default: int | None = None) -> int:
    return as_integer(config.get(field, default), in_file(_CONFIG, field), 1, _MOST)


def _number(config: Mapping[str, Json], field: str, default: float | None = None) -> float:
    value = optional_number(config, field, _CONFIG)
    value = default if value is None else value
    if value is None:
        raise ConfigError("expected a number, found nothing", where=in_file(_CONFIG, field))
    return value
