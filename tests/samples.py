"""A small adapter of each kind that the conversion matrix names, besides a plain layer that every format holds."""

from __future__ import annotations

from strategies import lazy

from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.updates import Dense, Kronecker, LowRank, Magnitude, Replace, Rows, Scaled, SubtractedInit, Update

LAYER = "model.layers.0.self_attn.q_proj.weight"
PLAIN = LowRank(lazy(8, 2), lazy(2, 8, seed=1), 1.5)

SAMPLES: dict[str, dict[str, tuple[Update, ...]]] = {
    "linear": {},
    "embedding": {"model.embed_tokens.weight": (LowRank(lazy(9, 2), lazy(2, 3), 1.5, is_embedding=True),)},
    "convolution": {"stem.conv.weight": (LowRank(lazy(4, 2), lazy(2, 3 * 4), 1.5, kernel=(2, 2)),)},
    "dora": {LAYER: (LowRank(lazy(8, 2), lazy(2, 8, seed=1), 1.5, Magnitude(lazy(8, seed=2))),)},
    "bias": {"model.layers.0.self_attn.q_proj.bias": (Replace(lazy(5)),)},
    "full weights": {"model.norm.weight": (Replace(lazy(3)),)},
    "trained rows": {"model.embed_tokens.weight": (Rows((4, 1), lazy(2, 3)),)},
    "dense delta": {"model.norm.weight": (Dense(lazy(3)),)},
    "experts": {"mlp.experts.weight": (LowRank(lazy(3, 5, 2), lazy(3, 2, 4), 1.5),)},
    "init subtracted from the base (PiSSA, OLoRA)": {"k_proj.weight": (SubtractedInit("pissa", 2, 1.5, (8, 8)), PLAIN)},
    "LoHa/LoKr": {"k_proj.weight": (Kronecker((lazy(2, 1),), (lazy(2, 3),), 1.5),)},
    "multiplicative (IA3, OFT …)": {"k_proj.weight": (Scaled(lazy(5)),)},
}


def sample(kind: str) -> Adapter:
    updates = {LAYER: (PLAIN,), **SAMPLES[kind]}
    return Adapter(config=AdapterConfig(), updates=dict(sorted(updates.items())))


IMAGES = ("diffusers", "kohya", "comfy", "lycoris")
_BLOCK = "transformer.transformer_blocks.0"
_IMAGE_LAYER = f"{_BLOCK}.ff.net.0.proj.weight"


def image_sample(kind: str) -> Adapter:
    """As `sample`, with the names of FLUX.1 where a layer of a language model stands there."""
    others = {f"{_BLOCK}.ff.net.2.{name.rpartition('.')[2]}": chain for name, chain in SAMPLES[kind].items()}
    moved = {_IMAGE_LAYER: SAMPLES[kind][LAYER]} if LAYER in SAMPLES[kind] else others
    updates = {_IMAGE_LAYER: (PLAIN,), **moved}
    pipeline = Pipeline(families=("flux",), components=("transformer",))
    return Adapter(config=AdapterConfig(pipeline=pipeline), updates=dict(sorted(updates.items())))
