"""torchtune's own adapter files: adapter_model.pt, in older versions adapter_N.pt. Read only.

Source: torchtune 0.6.1, models/convert_weights.py `hf_to_tune`, `tune_to_peft_adapter_weights`;
models/qwen2/_convert_weights.py; models/phi3/_convert_weights.py; modules/peft/dora.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights, show
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.blocks import block_columns, chosen_rows, stacked
from loraformat.formats.kit.fields import Config, optional_integer, optional_number, optional_text, readable
from loraformat.formats.kit.findings import not_only_tensors, unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files, tokenizer_files
from loraformat.formats.kit.pairs.spelling import pairs_of
from loraformat.formats.kit.pairs.torchtune_file import MODULE, SPELLING, own_file
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Magnitude, Update
from loraformat.naming import heads_of

NAME = "torchtune"
TITLE = "torchtune: adapter_model.pt, or adapter_N.pt, with layers.N.attn.q_proj.lora_a.weight"
SPEC = "docs/formats/torchtune.md"
READS: tuple[str, ...] = ("linear", "dora")

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

# What the export to PEFT beside it is called; its settings are those of the run.
_SETTINGS = "adapter_config.json"
_MAGNITUDE = ".magnitude"
_HEAD = "output"

_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Phi-3 joins what torchtune keeps apart.
_JOINED = {
    "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
}
_ROTARY = ("attn.q_proj", "attn.k_proj")

# By `model_type`: whether torchtune keeps the two halves of each head of q and k interleaved, and whether the
# checkpoint joins q, k and v. Qwen 2's and Phi 3's converters leave the rows as they are.
_INTERLEAVED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_PLAIN = frozenset({"qwen2"})
_FUSED = frozenset({"phi3"})


@dataclass(frozen=True, slots=True)
class _Layer:
    """The tensors of one module, rows in the order of the checkpoint."""

    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None


def sniff(bundle: Bundle) -> Match | None:
    """By the names of the tensors in adapter_model.pt, or in the only file; opens its header."""
    file = own_file(bundle)
    return None if file is None else Match(certain=True, reason=f"{file.name} has the names of torchtune's modules")


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a file of torchtune, under the names and in the row order of the Hugging Face checkpoint.

    Raises:
        MissingFile (LF101): no such file.
        ConfigError (LF103): a setting that cannot be used, or factors that do not fit the heads of the base.
        UnsupportedUpdate (LF013): the order of the rows depends on the base, which is not given or is of a model that
            torchtune does not convert; a module whose name in the checkpoint is not known.
    """
    file = own_file(bundle)
    if file is None:
        raise MissingFile("expected adapter_model.pt or adapter_N.pt of torchtune", where=bundle.uri)
    tensors, where = file.open(), in_file(file.name)
    settings = readable(bundle, _SETTINGS)
    config: Config = settings if isinstance(settings, dict) else {}
    pairs, _ = pairs_of(tensors.entries, SPELLING)
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    taken = {name for pair in whole.values() for name in pair.names}
    layers = {}
    for module, pair in whole.items():
        magnitude = tensors.entries.get(module + _MAGNITUDE)
        if magnitude is not None:
            taken.add(module + _MAGNITUDE)
        layers[module] = _checked(module, _Layer(*pair.factors, magnitude))
    rank = agreed(optional_integer(config, "r", _SETTINGS, 1, MAX_RANK), hints.rank, "rank", where)
    updates = dict(_updates(layers, config, rank, hints, where))
    own = (file.name, _SETTINGS, *_exports(bundle))
    return Adapter(
        config=AdapterConfig(
            base_model=optional_text(config, "base_model_name_or_path", _SETTINGS),
            declared_ranks={} if rank is None else _declared(updates, layers, rank),
            raw=config,
        ),
        updates={weight: (updates[weight],) for weight in sorted(updates)},
        tokenizer=tokenizer_files(bundle),
        other_files=other_files(bundle, own),
        unclaimed={name: tensor for name, tensor in tensors.entries.items() if name not in taken},
        notes=(*_notes(pairs, tensors, where), *left_behind(bundle, own)),
    )


def _exports(bundle: Bundle) -> list[str]:
    """The same adapter in PEFT's names beside it: not always right, and not needed."""
    return [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in bundle.files]


def _checked(module: str, layer: _Layer) -> _Layer:
    a, b, magnitude = layer.a, layer.b, layer.magnitude
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0] or not a.shape[0]:
        found = f"{a.shape} and {b.shape}"
        raise ConfigError(f"expected lora_a (rank, in) and lora_b (out, rank), found {found}", where=in_weights(module))
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise ConfigError(
            f"expected a magnitude of shape ({b.shape[0]},), found {magnitude.shape}", where=in_weights(module)
        )
    return layer


def _updates(
    layers: Mapping[str, _Layer], config: Config, rank: int | None, hints: Hints, where: FindingLocation
) -> Iterator[tuple[str, LowRank]]:
    kind = _model_type(layers, hints, where)
    alpha = optional_number(config, "lora_alpha", _SETTINGS)
    named: dict[str, _Layer] = {}
    for module, layer in layers.items():
        named.update(_named(module, layer, kind, hints))
    for module, joined in _in_checkpoint(named, kind):
        each = [layer.a.shape[0] for layer in joined if layer is not None]
        scale = scale_of(alpha, rank or each[0], Scaling(), hints, where)
        yield f"{module}.weight", _low_rank(module, joined, scale, hints)


def _model_type(layers: Mapping[str, _Layer], hints: Hints, where: FindingLocation) -> str:
    """The `model_type` of the base; "" where nothing depends on it. Raises UnsupportedUpdate (LF013)."""
    found = hints.config.get("model_type")
    if found in (*_INTERLEAVED, *_PLAIN, *_FUSED):
        return str(found)
    depends = [module for module in layers if module.endswith(_ROTARY)]
    if found is None and not depends:
        return ""
    if found is None:
        raise UnsupportedUpdate(
            f"the order of the rows of {depends[0]} depends on the base, and no base is given",
            where=where,
            hint="pass it with --base; --from peft reads the export next to it, whose order is right only for Llama",
        )
    models = ", ".join(sorted((*_INTERLEAVED, *_PLAIN, *_FUSED)))
    raise UnsupportedUpdate(
        f"torchtune's order of rows is unknown for a base of model_type {show(found, 40)}: expected one of {models}",
        where=where,
    )


def _named(module: str, layer: _Layer, kind: str, hints: Hints) -> dict[str, _Layer]:
    """The layer under torchtune's name, its rows in the checkpoint's order."""
    found = MODULE.fullmatch(module)
    if found is None and module != _HEAD:
        raise UnsupportedUpdate("the name of this module in checkpoints is unknown", where=in_weights(module))
    if found is None or found[2] not in _ROTARY or kind not in _INTERLEAVED:
        return {module: layer}
    heads = heads_of(hints.config)
    order = _rotary_order(module, layer.b.shape[0], heads.query if found[2] == _ROTARY[0] else heads.key, heads.size)
    magnitude = None if layer.magnitude is None else chosen_rows(layer.magnitude, order)
    return {module: replace(layer, b=chosen_rows(layer.b, order), magnitude=magnitude)}


def _rotary_order(module: str, rows: int, heads: int, size: int) -> list[int]:
    """Which of torchtune's rows each row of the checkpoint is: the even ones of a head first, then the odd ones."""
    if rows != heads * size:
        raise ConfigError(
            f"expected {heads * size} rows in lora_b, as the base has {heads} heads of {size} rows; found {rows}",
            where=in_weights(module),
            hint="is this the base of the adapter?",
        )
    in_head = [*range(0, size, 2), *range(1, size, 2)]
    return [head * size + row for head in range(heads) for row in in_head]


def _in_checkpoint(layers: Mapping[str, _Layer], kind: str) -> Iterator[tuple[str, tuple[_Layer | None, ...]]]:
    """(module of the checkpoint, the layers that it joins, None for one that is not adapted)."""
    done = set()
    for module, layer in layers.items():
        found = MODULE.fullmatch(module)
        if found is None:
            yield "lm_head", (layer,)
            continue
        path = f"model.layers.{found[1]}"
        joined = next((item for item in _JOINED.items() if kind in _FUSED and found[2] in item[1]), None)
        if joined is None:
            yield f"{path}.{_NAMES[found[2]]}", (layer,)
        elif f"{path}.{joined[0]}" not in done:
            done.add(f"{path}.{joined[0]}")
            yield f"{path}.{joined[0]}", tuple(layers.get(f"layers.{found[1]}.{part}") for part in joined[1])


def _low_rank(module: str, layers: Sequence[_Layer | None], scale: float | None, hints: Hints) -> LowRank:
    adapted = [layer for layer in layers if layer is not None]
    if len(layers) == 1:
        return factors.linear(adapted[0].a, adapted[0].b, scale, adapted[0].magnitude)
    if len({tensor.dtype for layer in adapted for tensor in (layer.a, layer.b)}) > 1:
        raise UnsupportedUpdate("the parts that the checkpoint fuses have different dtypes", where=in_weights(module))
    heights = _heights(module, layers, hints)
    blocks, top = [], 0
    for layer, height in zip(layers, heights, strict=True):
        if layer is not None:
            blocks.append((layer.b, [(top, top + height)]))
        top += height
    magnitudes = [layer.magnitude for layer in adapted if layer.magnitude is not None]
    if magnitudes and len(magnitudes) < len(layers):
        raise UnsupportedUpdate(
            "DoRA of only some of the parts that the checkpoint fuses: the others have no magnitude",
            where=in_weights(module),
        )
    vector = Magnitude(stacked(magnitudes), axis=1) if magnitudes else None
    return LowRank(block_columns(blocks, top), stacked([layer.a for layer in adapted]), scale, vector)


def _heights(module: str, layers: Sequence[_Layer | None], hints: Hints) -> tuple[int, ...]:
    """Rows of each part of a joined weight."""
    if len(layers) == len(_JOINED["mlp.gate_up_proj"]):
        height = next(layer.b.shape[0] for layer in layers if layer is not None)
        expected: tuple[int, ...] = (height, height)
    else:
        expected = heads_of(hints.config).rows
    found = tuple(size if layer is None else layer.b.shape[0] for layer, size in zip(layers, expected, strict=True))
    if found != expected:
        raise ConfigError(f"expected parts of {expected} rows, found {found}", where=in_weights(module))
    return expected


def _declared(updates: Mapping[str, Update], layers: Mapping[str, _Layer], rank: int) -> dict[str, int]:
    """As many times the stated rank as an update joins parts."""
    each = next((layer.a.shape[0] for layer in layers.values()), rank)
    return {
        weight: rank * max(1, update.rank // each)
        for weight, update in sorted(updates.items())
        if isinstance(update, LowRank)
    }


def _notes(pairs: Mapping[str, object], tensors: Tensors, where: FindingLocation) -> list[Finding]:
    notes = []
    for module in pairs:
        names = [f"{module}.lora_{part}.weight" in tensors.entries for part in "ab"]
        if names[0] != names[1]:
            present, absent = ("lora_a", "lora_b") if names[0] else ("lora_b", "lora_a")
            notes.append(unpaired_factor(in_weights(module, file=where.file), present, absent))
    if tensors.wrapper or tensors.extras:
        notes.append(not_only_tensors(where, tensors.wrapper, sorted(tensors.extras)))
    return notes
