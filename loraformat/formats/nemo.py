"""NeMo 1.x archives (.nemo), and the names of NeMo 2 and Megatron Bridge in one file. Read only.

Source: NVIDIA/NeMo 2d7ae5f, nemo/export/utils/lora_converter.py; 13d8018,
scripts/checkpoint_converters/lora_converters/convert_nemo_to_canonical.py; NVIDIA-NeMo/Megatron-Bridge 869bb39,
src/megatron/bridge/peft/canonical_lora.py, lora.py, dora_layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loraformat.diagnostics import Finding, FindingLocation, in_file, in_weights, show
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.blocks import chosen_rows
from loraformat.formats.kit.fields import Config, as_integer, as_object, optional_integer, optional_number
from loraformat.formats.kit.findings import not_only_tensors, unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files
from loraformat.formats.kit.pairs.spelling import Pair, Spelling, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, JsonFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank
from loraformat.naming import Heads, heads_of

NAME = "nemo"
TITLE = "NeMo: .nemo archives of model_config.yaml and model_weights.ckpt; Megatron Bridge's names in one file"
SPEC = "docs/formats/nemo.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
_SPELLING = (Spelling(".linear_in.weight", ".linear_out.weight"),)
_MAGNITUDE = "weight_magnitude"
_MOST = 1 << 30

# Inside a layer, NeMo 1.x's name or Megatron Bridge's → what it adapts: of the joined q, k and v all or one, of the
# joined gate and up both or one, or one module of its own.
_LAYER = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(\d{1,9})\.(.+)")
_MODULES = {
    "self_attention.adapter_layer.lora_kqv_adapter": ("q_proj", "k_proj", "v_proj"),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": ("q_proj",),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": ("k_proj",),
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": ("v_proj",),
    "self_attention.adapter_layer.lora_dense_attention_adapter": ("o_proj",),
    "mlp.adapter_layer.lora_hto4h_adapter": ("gate_proj", "up_proj"),
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": ("gate_proj",),
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter": ("up_proj",),
    "mlp.adapter_layer.lora_4htoh_adapter": ("down_proj",),
    "self_attention.linear_qkv.adapter": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_qkv.adapter.adapter_q": ("q_proj",),
    "self_attention.linear_qkv.adapter.adapter_k": ("k_proj",),
    "self_attention.linear_qkv.adapter.adapter_v": ("v_proj",),
    "self_attention.linear_proj.adapter": ("o_proj",),
    "mlp.linear_fc1.adapter": ("gate_proj", "up_proj"),
    "mlp.linear_fc1.adapter.adapter_gate": ("gate_proj",),
    "mlp.linear_fc1.adapter.adapter_up": ("up_proj",),
    "mlp.linear_fc2.adapter": ("down_proj",),
}
# The activations of a layer that has a gate. Source: NeMo 2d7ae5f, megatron/mlp.py `fast_glu_activation`.
_GATED = ("fast-geglu", "fast-swiglu", "fast-reglu", "geglu", "swiglu", "reglu")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the config of the archive says; None where it says nothing."""

    raw: Config
    rank: int | None
    alpha: float | None
    heads: Heads | None


def sniff(bundle: Bundle) -> Match | None:
    """By the config of an archive, or by names of Megatron's modules in the only file."""
    if CONFIG in bundle.files and WEIGHTS in bundle.files:
        return Match(certain=True, reason=f"{CONFIG} and {WEIGHTS} are there")
    if CONFIG in bundle.files and any(name.startswith(("mp_rank_", "tp_rank_")) for name in bundle.folders):
        return Match(certain=True, reason=f"{CONFIG} and folders of ranks are there")
    file = _only_file(bundle)
    pairs = {} if file is None else pairs_of(file.open().entries, _SPELLING)[0]
    if file is None or not any(_LAYER.fullmatch(module) for module in pairs):
        return None
    return Match(certain=True, reason=f"{file.name} has Megatron's names")


def _only_file(bundle: Bundle) -> TensorFile | None:
    files = bundle.tensor_files()
    return files[0] if len(files) == 1 else None


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of an archive or of one file, under the names of Llama's checkpoints.

    Raises:
        MissingFile (LF101): no weights, or weights in several parts.
        ConfigError (LF103): a setting that cannot be used, or factors that do not fit the heads.
        UnsupportedUpdate (LF013): a module whose name in a checkpoint is not known.
    """
    file = _weights(bundle)
    settings = _settings(bundle, hints)
    tensors, where = file.open(), in_file(file.name)
    pairs, _ = pairs_of(tensors.entries, _SPELLING)
    magnitude = next((name for name in tensors.entries if name.endswith(_MAGNITUDE)), None)
    if magnitude is not None:
        raise UnsupportedUpdate("DoRA of Megatron Bridge is not read", where=in_weights(magnitude))
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    rank = agreed(settings.rank, hints.rank, "rank", in_file(CONFIG))
    updates: dict[str, LowRank] = {}
    for module, pair in whole.items():
        scale = scale_of(settings.alpha, rank or pair.factors[1].shape[-1], Scaling(), hints, in_file(CONFIG))
        updates.update(_updates(module, *pair.factors, settings, scale))
    taken = {name for pair in whole.values() for name in pair.names}
    own = (file.name, CONFIG)
    return Adapter(
        config=AdapterConfig(
            declared_ranks={} if rank is None else dict.fromkeys(sorted(updates), rank),
            raw=settings.raw,
        ),
        updates={weight: (updates[weight],) for weight in sorted(updates)},
        other_files=other_files(bundle, own),
        unclaimed={name: tensor for name, tensor in tensors.entries.items() if name not in taken},
        notes=(*_notes(pairs, tensors, where), *left_behind(bundle, own)),
    )


def _weights(bundle: Bundle) -> TensorFile:
    ranks = [name for name in bundle.folders if name.startswith(("mp_rank_", "tp_rank_"))]
    if ranks:
        raise MissingFile(
            f"the weights lie in {len(ranks)} parts ({show(ranks[0], 60)} …): parts of a parallel run are not joined",
            where=bundle.uri,
            hint="save the adapter with tensor and pipeline parallelism of 1",
        )
    found = bundle.files.get(WEIGHTS) or _only_file(bundle)
    if not isinstance(found, TensorFile):
        raise MissingFile(f"{WEIGHTS} is missing", where=bundle.uri)
    return found


def _settings(bundle: Bundle, hints: Hints) -> _Settings:
    file = bundle.files.get(CONFIG)
    if not isinstance(file, JsonFile):
        return _Settings({}, None, None, heads_of(hints.config) if hints.config else None)
    raw = as_object(file.load(), in_file(CONFIG))
    peft = as_object(raw.get("peft", {}), in_file(CONFIG, "peft"))
    tuning = as_object(peft.get("lora_tuning", {}), in_file(CONFIG, "peft"))
    activation = raw.get("activation")
    if activation is not None and activation not in _GATED:
        raise UnsupportedUpdate(
            f"a model without a gate ({show(activation, 40)}): what checkpoints call its layers is not known",
            where=in_file(CONFIG, "activation"),
        )
    query = as_integer(raw.get("num_attention_heads"), in_file(CONFIG, "num_attention_heads"), 1, _MOST)
    key = optional_integer(raw, "num_query_groups", CONFIG, 1, _MOST) or query
    size = optional_integer(raw, "kv_channels", CONFIG, 1, _MOST)
    hidden = as_integer(raw.get("hidden_size"), in_file(CONFIG, "hidden_size"), 1, _MOST)
    if query % key:
        raise ConfigError(f"{query} heads cannot share {key} groups", where=in_file(CONFIG, "num_query_groups"))
    return _Settings(
        raw,
        optional_integer(tuning, "adapter_dim", CONFIG, 1, MAX_RANK),
        optional_number(tuning, "alpha", CONFIG),
        Heads(query, key, size or max(1, hidden // query)),
    )


def _updates(
    module: str, a: LazyTensor, b: LazyTensor, settings: _Settings, scale: float | None
) -> Iterator[tuple[str, LowRank]]:
    found = _LAYER.fullmatch(module)
    parts = () if found is None else _MODULES.get(found[2], ())
    if found is None or not parts:
        raise UnsupportedUpdate("what checkpoints call this module is not known", where=in_weights(module))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        text = f"expected linear_in (rank, in) and linear_out (out, rank), found {a.shape} and {b.shape}"
        raise ConfigError(text, where=in_weights(module))
    owner = "self_attn" if found[2].startswith("self_attention.") else "mlp"
    rows = _ROWS[len(parts)](module, b.shape[0], settings.heads)
    for part, chosen in zip(parts, rows, strict=True):
        up = b if chosen is None else chosen_rows(b, chosen)
        yield f"model.layers.{found[1]}.{owner}.{part}.weight", factors.linear(a, up, scale)


def _all(module: str, height: int, heads: Heads | None) -> list[list[int] | None]:
    del module, height, heads
    return [None]


def _halves(module: str, height: int, heads: Heads | None) -> list[list[int] | None]:
    """Gate above up."""
    del heads
    if height % 2:
        raise ConfigError(f"expected an even number of rows for gate and up, found {height}", where=in_weights(module))
    return [list(range(height // 2)), list(range(height // 2, height))]


def _groups(module: str, height: int, heads: Heads | None) -> list[list[int] | None]:
    """For each key head its queries, then the key, then the value."""
    if heads is None:
        raise UnsupportedUpdate(
            "how many heads the joined query, key and value have stands in the base's config",
            where=in_weights(module),
            hint="give it with --base",
        )
    size, each = heads.size, heads.query // heads.key
    if height != sum(heads.rows):
        text = f"{heads.query} query and {heads.key} key heads of {size} rows make {sum(heads.rows)} rows"
        raise ConfigError(f"{text}, linear_out has {height}", where=in_weights(module))
    groups = range(0, height, (each + 2) * size)
    runs = ((0, each), (each, each + 1), (each + 1, each + 2))
    return [
        [row for group in groups for row in range(group + first * size, group + last * size)] for first, last in runs
    ]


_ROWS: Mapping[int, Callable[[str, int, Heads | None], list[list[int] | None]]] = {1: _all, 2: _halves, 3: _groups}


def _notes(pairs: Mapping[str, Pair], tensors: Tensors, where: FindingLocation) -> Iterator[Finding]:
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("linear_out", "linear_in") if pair.a is None else ("linear_in", "linear_out")
            yield unpaired_factor(in_weights(module, file=where.file), present, absent)
    if tensors.wrapper or tensors.extras:
        yield not_only_tensors(where, tensors.wrapper, sorted(tensors.extras))
