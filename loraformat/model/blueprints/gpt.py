"""Decoders before Llama, each with names and settings of its own.

Source: transformers 5.23.0, models/*/modeling_*.py; names as checkpoints on the Hub have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loraformat.model.blueprints.fields import Fields, Shapes, with_bias


def _gpt2(fields: Fields) -> Shapes:
    """GPT-2 stores (in, out)."""
    hidden, vocabulary = fields.count("n_embd"), fields.count("vocab_size")
    inner = fields.count("n_inner", default=4 * hidden)
    yield "wte.weight", (vocabulary, hidden)
    yield "wpe.weight", (fields.count("n_positions"), hidden)
    modules = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
        "ln_1": (hidden,),
        "ln_2": (hidden,),
    }
    for layer in range(fields.layers("n_layer", weights=12)):
        for name, shape in modules.items():
            yield from with_bias(f"h.{layer}.{name}", shape, outputs=-1)
    yield from with_bias("ln_f", (hidden,))
    yield from _head(fields, (vocabulary, hidden))


def _gpt_bigcode(fields: Fields) -> Shapes:
    """StarCoder; with `multi_query` all heads share one key and one value."""
    hidden, vocabulary = fields.count("n_embd"), fields.count("vocab_size")
    inner = fields.count("n_inner", default=4 * hidden)
    pairs = hidden // fields.count("n_head") if fields.flag("multi_query", default=True) else hidden
    yield "transformer.wte.weight", (vocabulary, hidden)
    yield "transformer.wpe.weight", (fields.count("n_positions"), hidden)
    modules = {
        "attn.c_attn": (hidden + 2 * pairs, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (inner, hidden),
        "mlp.c_proj": (hidden, inner),
        "ln_1": (hidden,),
        "ln_2": (hidden,),
    }
    for layer in range(fields.layers("n_layer", weights=12)):
        for name, shape in modules.items():
            yield from with_bias(f"transformer.h.{layer}.{name}", shape)
    yield from with_bias("transformer.ln_f", (hidden,))
    yield from _head(fields, (vocabulary, hidden))


def _gpt_neox(fields: Fields) -> Shapes:
    """GPT-NeoX and Pythia."""
    hidden, inner = fields.count("hidden_size"), fields.count("intermediate_size")
    vocabulary, has_bias = fields.count("vocab_size"), fields.flag("attention_bias", default=True)
    yield "gpt_neox.embed_in.weight", (vocabulary, hidden)
    modules = {
        "attention.query_key_value": ((3 * hidden, hidden), has_bias),
        "attention.dense": ((hidden, hidden), has_bias),
        "mlp.dense_h_to_4h": ((inner, hidden), True),
        "mlp.dense_4h_to_h": ((hidden, inner), True),
        "input_layernorm": ((hidden,), True),
        "post_attention_layernorm": ((hidden,), True),
    }
    for layer in range(fields.layers("num_hidden_layers", weights=12)):
        for name, (shape, is_biased) in modules.items():
            yield from with_bias(f"gpt_neox.layers.{layer}.{name}", shape, is_biased)
    yield from with_bias("gpt_neox.final_layer_norm", (hidden,))
    yield from _head(fields, (vocabulary, hidden), "embed_out.weight", ties=False)


def _bloom(fields: Fields) -> Shapes:
    hidden, vocabulary = fields.count("hidden_size", "n_embed"), fields.count("vocab_size")
    yield "word_embeddings.weight", (vocabulary, hidden)
    yield from with_bias("word_embeddings_layernorm", (hidden,))
    modules = {
        "self_attention.query_key_value": (3 * hidden, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(fields.layers("n_layer", "num_hidden_layers", weights=12)):
        for name, shape in modules.items():
            yield from with_bias(f"h.{layer}.{name}", shape)
    yield from with_bias("ln_f", (hidden,))
    yield from _head(fields, (vocabulary, hidden))


def _opt(fields: Fields) -> Shapes:
    """OPT; its tables are narrower than its layers where `word_embed_proj_dim` says so (350m)."""
    hidden, inner = fields.count("hidden_size"), fields.count("ffn_dim")
    narrow, has_bias = fields.count("word_embed_proj_dim", default=hidden), fields.flag("enable_bias", default=True)
    before, vocabulary = "model.decoder.", fields.count("vocab_size")
    yield f"{before}embed_tokens.weight", (vocabulary, narrow)
    yield f"{before}embed_positions.weight", (fields.count("max_position_embeddings") + 2, hidden)
    if narrow != hidden:
        yield f"{before}project_in.weight", (hidden, narrow)
        yield f"{before}project_out.weight", (narrow, hidden)
    modules = {
        **{f"self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "fc1": (inner, hidden),
        "fc2": (hidden, inner),
    }
    has_norms = fields.flag("layer_norm_elementwise_affine", default=True)
    norms = ("self_attn_layer_norm", "final_layer_norm") if has_norms else ()
    for layer in range(fields.layers("num_hidden_layers", weights=16)):
        for name, shape in modules.items():
            yield from with_bias(f"{before}layers.{layer}.{name}", shape, has_bias)
        for name in norms:
            yield from with_bias(f"{before}layers.{layer}.{name}", (hidden,))
    is_normed = fields.flag("do_layer_norm_before", default=True) and not fields.flag("_remove_final_layer_norm")
    if has_norms and is_normed:
        yield from with_bias(f"{before}final_layer_norm", (hidden,))
    yield from _head(fields, (vocabulary, narrow))


def _head(fields: Fields, shape: tuple[int, int], name: str = "lm_head.weight", *, ties: bool = True) -> Shapes:
    """The head where it is a table of its own; `ties`: whether it is the embedding where config.json does not say."""
    if not fields.flag("tie_word_embeddings", default=ties):
        yield name, shape


GPTS: Mapping[str, Callable[[Fields], Shapes]] = {
    "bloom": _bloom,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
