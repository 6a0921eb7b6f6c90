"""Names and shapes of a model's weights from its config.json alone, for decoders that many adapters are made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraformat.errors import ConfigError, FormatError
from loraformat.model.bundle import Json

Shapes = Iterator[tuple[str, tuple[int, ...]]]
_MOST = 1 << 31
_MOST_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Family:
    """How a decoder in the manner of Llama differs from it.

    Attributes:
        qkv_bias: whether q, k, v have biases; None where config.json says `attention_bias`, which o then has too.
        head_norm: size of q_norm and k_norm: "head" for each head, "all" for all heads together, "" for none.
        norms: names of the norms of a layer.
        is_fused: whether q, k, v and gate, up are stored as one.
        ties: whether embedding and head are one table where config.json does not say.
        experts: how experts are stored: "" for none, "mixtral", "qwen".
    """

    qkv_bias: bool | None = False
    head_norm: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    is_fused: bool = False
    ties: bool = False
    experts: str = ""


_GEMMA2 = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# Source: transformers 5.23.0, models/*/modeling_*.py; experts as checkpoints on the Hub name them.
_FAMILIES = {
    "gemma": _Family(qkv_bias=None, ties=True),
    "gemma2": _Family(qkv_bias=None, norms=_GEMMA2, ties=True),
    "llama": _Family(qkv_bias=None),
    "mistral": _Family(),
    "mixtral": _Family(experts="mixtral"),
    "olmo2": _Family(qkv_bias=None, head_norm="all", norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "phi3": _Family(is_fused=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen2_moe": _Family(qkv_bias=True, experts="qwen"),
    "qwen3": _Family(qkv_bias=None, head_norm="head"),
    "qwen3_moe": _Family(qkv_bias=None, head_norm="head", experts="qwen"),
}

KNOWN = (*sorted(_FAMILIES), "gpt2")


def blueprint(config: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight that a checkpoint of this config stores, in Linear orientation but for GPT-2's.

    Raises:
        FormatError (LF012): the architecture is none of KNOWN.
        ConfigError (LF103): a field is missing or is no positive integer.
    """
    model_type = config.get("model_type")
    if model_type == "gpt2":
        return dict(_gpt2(_Fields(config)))
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FormatError(
            f"weights cannot be told from model_type {model_type!r} alone, only from those of {', '.join(KNOWN)}",
            where="config.json",
            hint="give the folder of the checkpoint: its headers are enough",
        )
    fields = _Fields(config)
    experts = fields.count("num_local_experts", "num_experts") if family.experts else 0
    if fields.count("num_hidden_layers") * (12 + 3 * experts) > _MOST_WEIGHTS:
        raise ConfigError("num_hidden_layers and experts make more weights than any model has", where="config.json")
    return dict(_decoder(fields, family))


class _Fields:
    """Integers of a config.json, checked."""

    def __init__(self, config: Mapping[str, Json]) -> None:
        self._config = config

    def count(self, *names: str, default: int | None = None) -> int:
        """The first of the fields that is there, at least 1."""
        found = next((self._config[name] for name in names if self._config.get(name) is not None), default)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < _MOST:
            raise ConfigError(f"{names[0]}: expected a positive integer, found {found!r}", where="config.json")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        found = self._config.get(name)
        return found if isinstance(found, bool) else default

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of integers; () where there is none."""
        found = self._config.get(name)
        return tuple(each for each in found if isinstance(each, int)) if isinstance(found, (list, tuple)) else ()


def _decoder(fields: _Fields, family: _Family) -> Shapes:
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(fields.count("num_hidden_layers")):
        before = f"model.layers.{layer}."
        yield from ((before + name, shape) for name, shape in _attention(fields, family))
        if family.experts and _has_experts(fields, layer):
            yield from ((before + name, shape) for name, shape in _experts(fields, family))
        else:
            yield from ((before + name, shape) for name, shape in _mlp(fields, family))
        yield from ((f"{before}{norm}.weight", (hidden,)) for norm in family.norms)
    yield "model.norm.weight", (hidden,)
    if not fields.flag("tie_word_embeddings", family.ties):
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(fields: _Fields, family: _Family) -> Shapes:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    pairs = fields.count("num_key_value_heads", default=heads)
    size = fields.count("head_dim", default=max(1, hidden // heads))
    sizes = {"q_proj": heads * size, "k_proj": pairs * size, "v_proj": pairs * size}
    if family.is_fused:
        sizes = {"qkv_proj": sum(sizes.values())}
    has_bias = fields.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias
    for name, rows in sizes.items():
        yield f"self_attn.{name}.weight", (rows, hidden)
        if has_bias:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, heads * size)
    if has_bias and family.qkv_bias is None:
        yield "self_attn.o_proj.bias", (hidden,)
    if family.head_norm:
        each = family.head_norm == "head"
        yield "self_attn.q_norm.weight", (size if each else heads * size,)
        yield "self_attn.k_norm.weight", (size if each else pairs * size,)


def _mlp(fields: _Fields, family: _Family, before: str = "mlp.", size: int | None = None) -> Shapes:
    hidden, inner = fields.count("hidden_size"), size or fields.count("intermediate_size")
    ups = {"gate_up_proj": 2 * inner} if family.is_fused else {"gate_proj": inner, "up_proj": inner}
    shapes = {**{name: (rows, hidden) for name, rows in ups.items()}, "down_proj": (hidden, inner)}
    for name, shape in shapes.items():
        yield f"{before}{name}.weight", shape
        if fields.flag("mlp_bias"):
            yield f"{before}{name}.bias", shape[:1]


def _has_experts(fields: _Fields, layer: int) -> bool:
    step = fields.count("decoder_sparse_step", default=1)
    return layer not in fields.numbers("mlp_only_layers") and (layer + 1) % step == 0


def _experts(fields: _Fields, family: _Family) -> Shapes:
    hidden, count = fields.count("hidden_size"), fields.count("num_local_experts", "num_experts")
    if family.experts == "mixtral":
        inner = fields.count("intermediate_size")
        yield "block_sparse_moe.gate.weight", (count, hidden)
        for number in range(count):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield f"block_sparse_moe.experts.{number}.{name}.weight", shape
        return
    yield "mlp.gate.weight", (count, hidden)
    inner = fields.count("moe_intermediate_size")
    for number in range(count):
        yield from _mlp(fields, family, f"mlp.experts.{number}.", inner)
    if family.qkv_bias:  # Qwen2 has an expert that always works, Qwen3 has none
        yield from _mlp(fields, family, "mlp.shared_expert.", fields.count("shared_expert_intermediate_size"))
        yield "mlp.shared_expert_gate.weight", (1, hidden)


def _gpt2(fields: _Fields) -> Shapes:
    """GPT-2 stores (in, out)."""
    hidden = fields.count("n_embd")
    inner = fields.count("n_inner", default=4 * hidden)
    yield "wte.weight", (fields.count("vocab_size"), hidden)
    yield "wpe.weight", (fields.count("n_positions"), hidden)
    layers = fields.count("n_layer")
    if layers > _MOST_WEIGHTS // 12:
        raise ConfigError(f"n_layer: {layers} is more than any model has", where="config.json")
    shapes = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
        "ln_1": (hidden,),
        "ln_2": (hidden,),
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            yield f"h.{layer}.{name}.weight", shape
            yield f"h.{layer}.{name}.bias", shape[-1:]
    yield "ln_f.weight", (hidden,)
    yield "ln_f.bias", (hidden,)
