"""Decoders like Llama: attention projections, an MLP or experts, norms, the same in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.blueprints.fields import Fields, Shapes, with_bias

_EXPERTS = ("num_local_experts", "num_experts")

# A field of config.json that is true or false, and what it is where config.json does not say; "" for no field.
_Flag = tuple[str, bool]

_GATED = ("gate_proj", "up_proj", "down_proj")
_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_AROUND = (*_BEFORE, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AROUND_GLM = (*_BEFORE, "post_self_attn_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True, slots=True)
class Family:
    """How a decoder in the manner of Llama differs from it.

    Attributes:
        qkv_bias, out_bias, mlp_bias: whether there are biases; `out_bias` None for the same as q, k and v.
        out: what the output projection of attention is called.
        mlp: the layers of the MLP, the last one back to the hidden size; "gate_up_proj" is two in one.
        head_size: where config.json does not say; 0 for the hidden size divided among the heads.
        head_norm: size of q_norm and k_norm: "head" for each head, "all" for all heads together, "" for none.
        norms: names of the norms of a layer.
        last_norm: name of the norm after the layers; "" for none.
        norm_bias: whether norms have biases.
        is_fused: whether q, k, v are stored as one.
        ties: whether embedding and head are one table where config.json does not say.
        head_bias: whether the head has a bias.
        experts: how experts are stored: "" for none, "mixtral", "qwen".
        expert_size: the field with the inner size of an expert of "qwen".
        has_shared_expert: whether one expert always works.
        unknown: fields with which there are other weights.
    """

    qkv_bias: _Flag = ("attention_bias", False)
    out_bias: _Flag | None = None
    mlp_bias: _Flag = ("mlp_bias", False)
    out: str = "o_proj"
    mlp: tuple[str, ...] = _GATED
    head_size: int = 0
    head_norm: str = ""
    norms: tuple[str, ...] = _BEFORE
    last_norm: str = "norm"
    norm_bias: bool = False
    is_fused: bool = False
    ties: bool = False
    head_bias: bool = False
    experts: str = ""
    expert_size: str = "moe_intermediate_size"
    has_shared_expert: bool = False
    unknown: tuple[str, ...] = ()


_NEVER, _ALWAYS = ("", False), ("", True)
_FUSED_UP = ("gate_up_proj", "down_proj")

# Source: transformers 5.23.0, models/*/modeling_*.py; experts as checkpoints on the Hub name them.
FAMILIES = {
    "arcee": Family(mlp=("up_proj", "down_proj")),
    "cohere": Family(norms=_BEFORE[:1], ties=True, unknown=("use_qk_norm",)),
    "cohere2": Family(norms=_BEFORE[:1], ties=True),
    "ernie4_5": Family(qkv_bias=("use_bias", False), mlp_bias=("use_bias", False), head_size=128, ties=True),
    "exaone4": Family(qkv_bias=_NEVER, head_norm="head", norms=_AFTER),
    "gemma": Family(head_size=256, ties=True),
    "gemma2": Family(head_size=256, norms=_AROUND, ties=True),
    "gemma3_text": Family(head_size=256, head_norm="head", norms=_AROUND, ties=True),
    "glm": Family(qkv_bias=("attention_bias", True), out_bias=_NEVER, mlp=_FUSED_UP, head_size=128),
    "glm4": Family(qkv_bias=("attention_bias", True), out_bias=_NEVER, mlp=_FUSED_UP, head_size=128, norms=_AROUND_GLM),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(qkv_bias=_NEVER),
    "mixtral": Family(qkv_bias=_NEVER, experts="mixtral"),
    "nemotron": Family(mlp=("up_proj", "down_proj"), norm_bias=True),
    "olmo": Family(norms=(), last_norm=""),
    "olmo2": Family(head_norm="all", norms=_AFTER),
    "olmo3": Family(head_norm="all", norms=_AFTER),
    "olmoe": Family(head_norm="all", experts="qwen", expert_size="intermediate_size"),
    "phi": Family(
        qkv_bias=_ALWAYS,
        mlp_bias=_ALWAYS,
        out="dense",
        mlp=("fc1", "fc2"),
        norms=_BEFORE[:1],
        last_norm="final_layernorm",
        norm_bias=True,
        head_bias=True,
        unknown=("qk_layernorm",),
    ),
    "phi3": Family(qkv_bias=_NEVER, mlp=_FUSED_UP, is_fused=True),
    "qwen2": Family(qkv_bias=_ALWAYS, out_bias=_NEVER),
    "qwen2_moe": Family(qkv_bias=("qkv_bias", True), out_bias=_NEVER, experts="qwen", has_shared_expert=True),
    "qwen3": Family(head_size=128, head_norm="head"),
    "qwen3_moe": Family(head_norm="head", experts="qwen"),
    "seed_oss": Family(qkv_bias=("attention_bias", True), out_bias=("attention_out_bias", False), head_size=128),
    "smollm3": Family(ties=True),
    "stablelm": Family(
        qkv_bias=("use_qkv_bias", False),
        out_bias=_NEVER,
        norm_bias=True,
        unknown=("qk_layernorm", "use_parallel_residual"),
    ),
    "starcoder2": Family(
        qkv_bias=("use_bias", True), mlp_bias=("use_bias", True), mlp=("c_fc", "c_proj"), norm_bias=True, ties=True
    ),
}


def decoder(fields: Fields, family: Family) -> Shapes:
    """Every weight that a checkpoint of a family stores. Raises: ConfigError (LF103)."""
    hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    experts = fields.count(*_EXPERTS) if family.experts else 0
    for layer in range(fields.layers("num_hidden_layers", weights=12 + 3 * experts)):
        before = f"model.layers.{layer}."
        yield from ((before + name, shape) for name, shape in _attention(fields, family))
        if family.experts and _has_experts(fields, layer):
            yield from ((before + name, shape) for name, shape in _experts(fields, family))
        else:
            yield from ((before + name, shape) for name, shape in _mlp(fields, family))
        for norm in family.norms:
            yield from with_bias(before + norm, (hidden,), family.norm_bias)
    if family.last_norm:
        yield from with_bias(f"model.{family.last_norm}", (hidden,), family.norm_bias)
    if not fields.flag("tie_word_embeddings", family.ties):
        yield "lm_head.weight", (vocabulary, hidden)
    if family.head_bias:
        yield "lm_head.bias", (vocabulary,)


def _attention(fields: Fields, family: Family) -> Shapes:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    pairs = fields.count("num_key_value_heads", default=heads)
    size = fields.count("head_dim", default=family.head_size or max(1, hidden // heads))
    sizes = {"q_proj": heads * size, "k_proj": pairs * size, "v_proj": pairs * size}
    if family.is_fused:
        sizes = {"qkv_proj": sum(sizes.values())}
    for name, rows in sizes.items():
        yield from with_bias(f"self_attn.{name}", (rows, hidden), fields.flag(*family.qkv_bias))
    has_bias = fields.flag(*(family.out_bias or family.qkv_bias))
    yield from with_bias(f"self_attn.{family.out}", (hidden, heads * size), has_bias)
    if family.head_norm:
        each = family.head_norm == "head"
        yield "self_attn.q_norm.weight", (size if each else heads * size,)
        yield "self_attn.k_norm.weight", (size if each else pairs * size,)


def _mlp(fields: Fields, family: Family, before: str = "mlp.", size: int | None = None) -> Shapes:
    hidden, inner = fields.count("hidden_size"), size or fields.count("intermediate_size")
    *ups, down = family.mlp
    shapes = {name: (2 * inner if name == "gate_up_proj" else inner, hidden) for name in ups}
    for name, shape in {**shapes, down: (hidden, inner)}.items():
        yield from with_bias(before + name, shape, fields.flag(*family.mlp_bias))


def _has_experts(fields: Fields, layer: int) -> bool:
    step = fields.count("decoder_sparse_step", default=1)
    return layer not in fields.numbers("mlp_only_layers") and (layer + 1) % step == 0


def _experts(fields: Fields, family: Family) -> Shapes:
    hidden, count = fields.count("hidden_size"), fields.count(*_EXPERTS)
    if family.experts == "mixtral":
        inner = fields.count("intermediate_size")
        yield "block_sparse_moe.gate.weight", (count, hidden)
        for number in range(count):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield f"block_sparse_moe.experts.{number}.{name}.weight", shape
        return
    yield "mlp.gate.weight", (count, hidden)
    inner = fields.count(family.expert_size)
    for number in range(count):
        yield from _mlp(fields, family, f"mlp.experts.{number}.", inner)
    if family.has_shared_expert:
        yield from _mlp(fields, family, "mlp.shared_expert.", fields.count("shared_expert_intermediate_size"))
        yield "mlp.shared_expert_gate.weight", (1, hidden)
