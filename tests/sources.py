"""An adapter as each format spells it: by our writers, and by hand where a format is only read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bundles import bundle, loaded, tensors
from samples import IMAGES, SAMPLES, sample
from strategies import lazy
from test_every_format import read
from torch import Tensor

from loraformat import formats
from loraformat.diagnostics import Severity
from loraformat.formats.kit.base import Hints, WriteOptions
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Bundle
from loraformat.model.updates import LowRank, Magnitude

RANK, SCALE = 2, 1.5
_SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "num_attention_heads": 2}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 1,
    "head_dim": 4,
    **_SIZES,
}
NEOX = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **_SIZES, "intermediate_size": 32}
# What stands in the base of a kind; the others' is Qwen 3.
BASES = {"fused": NEOX, "tied head": {**QWEN3, "tie_word_embeddings": True}}

_Q, _V, _DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
_SHAPES = {_Q: (8, 8), _V: (4, 8), _DOWN: (8, 12), "lm_head.weight": (20, 8), "model.embed_tokens.weight": (20, 8)}


def low_rank(weight: str, *, rank: int = RANK, scale: float = SCALE, dora: bool = False, **more: Any) -> LowRank:
    rows, cols = _SHAPES[weight]
    magnitude = Magnitude(lazy(rows, seed=2)) if dora else None
    return LowRank(lazy(rows, rank), lazy(rank, cols, seed=1), scale, magnitude, **more)


def _made(*weights: str, **more: Any) -> dict[str, tuple[Any, ...]]:
    return {weight: (low_rank(weight, **more),) for weight in weights}


# The kinds that people have, each as the updates of one adapter of a language model.
KINDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "LoRA": _made(_Q, _V, _DOWN),
    "LoRA without q and k": _made(_V, _DOWN),
    "rsLoRA": _made(_Q, _V, rank=4, scale=8 / 4**0.5),
    "patterns": {**_made(_Q), **_made(_DOWN, rank=3, scale=0.5)},
    "DoRA": _made(_V, _DOWN, dora=True),
    "embeddings": {**_made(_Q), **_made("model.embed_tokens.weight", is_embedding=True)},
    "head": _made(_V, "lm_head.weight"),
    "tied head": _made(_V, "lm_head.weight"),
    "fused": {
        "gpt_neox.layers.0.attention.query_key_value.weight": (LowRank(lazy(24, 2), lazy(2, 8, seed=1), 1.5),),
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (LowRank(lazy(8, 2), lazy(2, 32, seed=1), 1.5),),
    },
    "square": _made(_Q),
}
# What each of them needs of a format, in the words of the matrix, besides linear layers.
NEEDS = {"DoRA": "dora", "embeddings": "embedding"}


def options_for(kind: str, container: str | None = None) -> WriteOptions:
    """What is known of the base."""
    return WriteOptions(container=container, base=Hints(config=BASES.get(kind, QWEN3)))


def adapters(source: str) -> dict[str, Adapter]:
    """Kind → an adapter with the names that this format is for."""
    if source in IMAGES:
        return _of_images()
    every = {kind: Adapter(config=AdapterConfig(), updates=dict(sorted(made.items()))) for kind, made in KINDS.items()}
    return {**every, **{f"sample: {kind}": sample(kind) for kind in SAMPLES}}


def _of_images() -> dict[str, Adapter]:
    """FLUX.1 with its text encoder."""
    plain = read("kohya/tiny-flux")
    lora = {weight: chain[0] for weight, chain in plain.updates.items()}
    every = {
        "LoRA": lora,
        "rsLoRA": {weight: replace(update, scale=8 / 2**0.5) for weight, update in lora.items()},
        "patterns": {
            weight: _widened(update, 2 + number % 2, 1.5 / (1 + number))
            for number, (weight, update) in enumerate(lora.items())
        },
        "DoRA": {
            weight: replace(update, magnitude=Magnitude(lazy(update.up.shape[0], seed=3)))
            for weight, update in lora.items()
        },
    }
    return {kind: replace(plain, updates={w: (update,) for w, update in made.items()}) for kind, made in every.items()}


def _widened(update: LowRank, rank: int, scale: float) -> LowRank:
    rows, cols = update.up.shape[0], update.down.shape[1]
    return replace(update, up=lazy(rows, rank), down=lazy(rank, cols, seed=1), scale=scale)


def needs_of(kind: str) -> set[str]:
    """The words of the matrix that an adapter needs."""
    if kind.startswith("sample: "):
        return {"linear", kind.removeprefix("sample: ")}
    return {"linear", *([NEEDS[kind]] if kind in NEEDS else [])}


def spelled(source: str, kind: str, adapter: Adapter) -> Bundle | None:
    """The files of an adapter in a format, or None where that has no way to say it."""
    each = formats.get(source)
    if not each.WRITES:
        return BY_HAND[source](adapter) if source in BY_HAND else None
    if any(loss.severity is Severity.ERROR for loss in each.losses(adapter, options_for(kind))):
        return None
    return bundle(loaded(each.write(adapter, options_for(kind))))


Factors = Mapping[str, tuple[Tensor, Tensor]]


def _factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Module → (A, B), where all updates are plain LoRA of one rank and one scale, of linear layers."""
    chains = list(adapter.updates.values())
    updates = [chain[0] for chain in chains if len(chain) == 1 and isinstance(chain[0], LowRank)]
    plain = [each for each in updates if not (each.magnitude or each.kernel or each.is_stack or each.is_embedding)]
    if len(plain) < len(chains) or len({(each.rank, each.scale) for each in plain}) > 1:
        return None
    return {
        module_of(weight): (chain[0].down.torch(), chain[0].up.torch()) for weight, chain in adapter.updates.items()
    }


def _settings(factors: Factors, adapter: Adapter) -> dict[str, Any]:
    rank = next(iter(factors.values()))[0].shape[0]
    return {"r": rank, "lora_alpha": next(iter(adapter.updates.values()))[0].scale * rank}


def _state_dict(
    a: str, b: str, *, transposed: bool = False, square: bool = False
) -> Callable[[Adapter], Bundle | None]:
    """A state dict with the names of somebody's own layer, and rank and alpha beside it."""

    def made(adapter: Adapter) -> Bundle | None:
        factors = _factors(adapter)
        if factors is None or (square and any(pair[0].shape[1] != pair[1].shape[0] for pair in factors.values())):
            return None
        pairs = {
            name: (one.T.contiguous(), two.T.contiguous()) if transposed else (one, two)
            for name, (one, two) in factors.items()
        }
        entries = {f"{name}{a}": one for name, (one, _) in pairs.items()}
        entries |= {f"{name}{b}": two for name, (_, two) in pairs.items()}
        extras = {f"args.{name}": value for name, value in _settings(factors, adapter).items()}
        return bundle({"lora.pth": tensors(entries, "torch", wrapper=("model_state_dict",), **extras)}, single=True)

    return made


def _tinker(adapter: Adapter) -> Bundle | None:
    factors = _factors(adapter)
    if factors is None:
        return None
    names = {
        module: f"base_model.model.{'model.unembed_tokens' if module == 'lm_head' else module}" for module in factors
    }
    entries = {
        f"{names[module]}.lora_{side}.weight": pair["AB".index(side)]
        for module, pair in factors.items()
        for side in "AB"
    }
    return bundle({"adapter_config.json": _settings(factors, adapter), "adapter_model.safetensors": entries})


_TORCHTUNE = {"self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.output_proj", "mlp.down_proj": "mlp.w2"}
_MEGATRON = {
    "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
    "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
    "mlp.down_proj": "mlp.linear_fc2.adapter",
}


def _in_layer(module: str, names: Mapping[str, str], prefix: str) -> str | None:
    parts = module.split(".", 3)
    found = names.get(parts[3]) if len(parts) == 4 else None
    return None if found is None else f"{prefix}.{parts[2]}.{found}"


def _torchtune(adapter: Adapter) -> Bundle | None:
    """DoRA too; not q and k, whose rows stand in an order that depends on the base."""
    plain = {w: tuple(_without_magnitude(each) for each in chain) for w, chain in adapter.updates.items()}
    factors = _factors(Adapter(config=adapter.config, updates=plain))
    if factors is None:
        return None
    names = {m: "output" if m == "lm_head" else _in_layer(m, _TORCHTUNE, "layers") for m in factors}
    if None in names.values():
        return None
    entries = {f"{names[m]}.lora_{side}.weight": pair["ab".index(side)] for m, pair in factors.items() for side in "ab"}
    for weight, (update,) in adapter.updates.items():
        if update.magnitude is not None:
            entries[f"{names[module_of(weight)]}.magnitude"] = update.magnitude.vector.torch()
    settings = {**_settings(factors, adapter), "peft_type": "LORA", "target_modules": sorted(factors)}
    return bundle({"adapter_config.json": settings, "adapter_model.pt": entries})


def _without_magnitude(update: Any) -> Any:
    has = isinstance(update, LowRank) and update.magnitude is not None and update.magnitude.axis == 1
    return replace(update, magnitude=None) if has else update


def _nemo(adapter: Adapter) -> Bundle | None:
    factors = _factors(adapter)
    names = {} if factors is None else {m: _in_layer(m, _MEGATRON, "decoder.layers") for m in factors}
    if factors is None or None in names.values():
        return None
    entries = {
        f"{names[m]}.linear_{side}.weight": pair[number]
        for m, pair in factors.items()
        for number, side in enumerate(("in", "out"))
    }
    settings = _settings(factors, adapter)
    run = {"peft": {"dim": settings["r"], "alpha": settings["lora_alpha"]}, "model": {}}
    return bundle({"run_config.yaml": run, "adapter.pt": tensors(entries, "torch")})


BY_HAND: dict[str, Callable[[Adapter], Bundle | None]] = {
    "tinker": _tinker,
    "torchtune": _torchtune,
    "nemo": _nemo,
    "minlora": _state_dict(".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B"),
    "raschka": _state_dict(".lora.A", ".lora.B", transposed=True),
    "minimind": _state_dict(".lora.A.weight", ".lora.B.weight", square=True),
    "dump": _state_dict(".lora.lora_A", ".lora.lora_B", transposed=True),
}
