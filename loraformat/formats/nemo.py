"""NeMo 1.x archives (.nemo), and checkpoints of NeMo 2 and Megatron Bridge. Read only.

Source: NVIDIA/NeMo 2d7ae5f, nemo/export/utils/lora_converter.py; 13d8018,
scripts/checkpoint_converters/lora_converters/convert_nemo_to_canonical.py; 01a01cb,
nemo/lightning/pytorch/callbacks/peft.py; NVIDIA-NeMo/Megatron-Bridge 869bb39, src/megatron/bridge/peft
(canonical_lora.py, lora.py, dora_layers.py); 067f987, src/megatron/bridge (training/checkpointing.py, peft/utils.py,
models/gpt_provider.py); NVIDIA/Megatron-LM d98e8a6, megatron/core/transformer/transformer_block.py
`sharded_state_dict`.
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
from loraformat.formats.kit.fields import (
    Config,
    as_integer,
    as_object,
    optional_integer,
    optional_number,
    optional_text,
    readable,
)
from loraformat.formats.kit.findings import file_left_behind, not_only_tensors, unpaired_factor
from loraformat.formats.kit.folder import left_behind, other_files
from loraformat.formats.kit.pairs.spelling import Pair, Spelling, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.formats.kit.scaling import MAX_RANK, Scaling, agreed, scale_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle, Json, JsonFile, TensorFile, Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank
from loraformat.naming import Heads, heads_of

NAME = "nemo"
TITLE = "NeMo 1: .nemo archives; NeMo 2 and Megatron Bridge: .metadata and .distcp files, or their names in one file"
SPEC = "docs/formats/nemo.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
SHARDED = ".metadata"  # a checkpoint of torch.distributed, as one weight file
RUN = "run_config.yaml"  # Megatron Bridge's
ORIGIN = "adapter_metadata.json"  # NeMo 2's
_OWN_FILES = (WEIGHTS, SHARDED, CONFIG, RUN, ORIGIN)
_SPELLING = (Spelling(".linear_in.weight", ".linear_out.weight"),)
_MAGNITUDE = "weight_magnitude"
_MOST = 1 << 30

# Inside a layer, NeMo 1.x's name or Megatron Bridge's → what it adapts: of the joined q, k and v all or one, of the
# joined gate and up both or one, or one module of its own.
_LAYER = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(\d{1,9})\.(.+)")
# Megatron-Core stacks the layers of a model whose layers are all built the same: one tensor for all, layers first.
_STACK = re.compile(r"((?:model\.)?(?:module\.)?decoder\.layers)\.((?:self_attention|mlp)\..+)")
# What a trainer keeps to go on, among the tensors of a checkpoint.
_STATE = re.compile(r"(?:chained_\d{1,9}\.)?optimizer\.")
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
    """What the config beside the weights says; None where it says nothing."""

    raw: Config
    rank: int | None = None
    alpha: float | None = None
    heads: Heads | None = None
    base_model: str | None = None


def sniff(bundle: Bundle) -> Match | None:
    """By the config of an archive, or by names of Megatron's modules in the only file."""
    if CONFIG in bundle.files and WEIGHTS in bundle.files:
        return Match(certain=True, reason=f"{CONFIG} and {WEIGHTS} are present")
    if CONFIG in bundle.files and any(name.startswith(("mp_rank_", "tp_rank_")) for name in bundle.folders):
        return Match(certain=True, reason=f"{CONFIG} and folders of ranks are present")
    file = _sharded(bundle) or _only_file(bundle)
    pairs = {} if file is None else pairs_of(file.open().entries, _SPELLING)[0]
    if file is None or not any(_LAYER.fullmatch(module) or _STACK.fullmatch(module) for module in pairs):
        return None
    return Match(certain=True, reason=f"{file.name} has Megatron's names")


def _sharded(bundle: Bundle) -> TensorFile | None:
    found = bundle.files.get(SHARDED)
    return found if isinstance(found, TensorFile) else None


def _only_file(bundle: Bundle) -> TensorFile | None:
    files = bundle.tensor_files()
    return files[0] if len(files) == 1 else None


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of an archive, a checkpoint or one file, under the names of Llama's checkpoints.

    Raises:
        MissingFile (LF101): no weights, or weights in several parts.
        ConfigError (LF103): a setting that cannot be used, or factors that do not fit the heads.
        UnsupportedUpdate (LF013): a module whose name in a checkpoint is not known.
    """
    file = _weights(bundle)
    settings = _settings(bundle, hints)
    tensors, where = file.open(), in_file(file.name)
    state = [name for name in tensors.entries if _STATE.match(name)]
    entries = _by_layer({name: lazy for name, lazy in tensors.entries.items() if not _STATE.match(name)})
    pairs, _ = pairs_of(entries, _SPELLING)
    magnitude = next((name for name in entries if name.endswith(_MAGNITUDE)), None)
    if magnitude is not None:
        raise UnsupportedUpdate("DoRA of Megatron Bridge is not supported", where=in_weights(magnitude))
    whole = {module: pair for module, pair in pairs.items() if pair.a is not None and pair.b is not None}
    rank = agreed(settings.rank, hints.rank, "rank", in_file(CONFIG))
    updates: dict[str, LowRank] = {}
    for module, pair in whole.items():
        scale = scale_of(settings.alpha, rank or pair.factors[1].shape[-1], Scaling(), hints, in_file(CONFIG))
        updates.update(_updates(module, *pair.factors, settings, scale))
    taken = {name for pair in whole.values() for name in pair.names}
    own = (file.name, *_OWN_FILES)
    return Adapter(
        config=AdapterConfig(
            base_model=settings.base_model,
            declared_ranks={} if rank is None else dict.fromkeys(sorted(updates), rank),
            raw=settings.raw,
        ),
        updates={weight: (updates[weight],) for weight in sorted(updates)},
        other_files=other_files(bundle, own),
        unclaimed={name: tensor for name, tensor in entries.items() if name not in taken},
        notes=(*_notes(pairs, tensors, state, where), *left_behind(bundle, own)),
    )


def _by_layer(entries: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors with those of all layers cut into one for each layer."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in entries.items():
        stack = _STACK.fullmatch(name)
        if stack is None or len(tensor.shape) < 2:
            found[name] = tensor
            continue
        for layer in range(tensor.shape[0]):
            found[f"{stack[1]}.{layer}.{stack[2]}"] = tensor.rows(layer, layer + 1).reshape(*tensor.shape[1:])
    return found


def _weights(bundle: Bundle) -> TensorFile:
    ranks = [name for name in bundle.folders if name.startswith(("mp_rank_", "tp_rank_"))]
    if ranks:
        raise MissingFile(
            f"the weights are split over {len(ranks)} parallel ranks ({show(ranks[0], 60)} …), which are not joined",
            where=bundle.uri,
            hint="save the adapter with tensor and pipeline parallelism of 1",
        )
    found = bundle.files.get(WEIGHTS) or _sharded(bundle) or _only_file(bundle)
    if not isinstance(found, TensorFile):
        raise MissingFile(f"{WEIGHTS} is missing", where=bundle.uri)
    return found


def _settings(bundle: Bundle, hints: Hints) -> _Settings:
    if isinstance(file := bundle.files.get(CONFIG), JsonFile):
        raw = as_object(file.load(), in_file(CONFIG))
        peft = as_object(raw.get("peft", {}), in_file(CONFIG, "peft"))
        tuning = as_object(peft.get("lora_tuning", {}), in_file(CONFIG, "peft"))
        activation = raw.get("activation")
        if activation is not None and activation not in _GATED:
            raise _no_gate(CONFIG, "activation", activation)
        rank = optional_integer(tuning, "adapter_dim", CONFIG, 1, MAX_RANK)
        return _Settings(raw, rank, optional_number(tuning, "alpha", CONFIG), _heads(raw, CONFIG))
    heads = heads_of(hints.config) if hints.config else None
    if isinstance(file := bundle.files.get(RUN), JsonFile):
        raw = as_object(file.load(), in_file(RUN))
        peft = as_object(raw.get("peft") or {}, in_file(RUN, "peft"))
        model = as_object(raw.get("model") or {}, in_file(RUN, "model"))
        if model.get("gated_linear_unit") is False:
            raise _no_gate(RUN, "gated_linear_unit", "false")
        rank = optional_integer(peft, "dim", RUN, 1, MAX_RANK)
        stated = _heads(model, RUN) if "num_attention_heads" in model else heads
        origin = optional_text(model, "hf_model_id", RUN)
        return _Settings(_of_peft(peft), rank, optional_number(peft, "alpha", RUN), stated, origin)
    written = readable(bundle, ORIGIN)
    path = written.get("model_ckpt_path") if isinstance(written, dict) else None
    return _Settings({}, heads=heads, base_model=path if isinstance(path, str) else None)


def _of_peft(peft: Config) -> dict[str, Json]:
    """Megatron Bridge's settings of the adapter; those of the run and the model are not carried along."""
    return {name: value for name, value in peft.items() if not name.startswith("_")}


def _no_gate(file: str, field: str, found: Json) -> UnsupportedUpdate:
    return UnsupportedUpdate(
        f"a model without a gate ({show(found, 40)}): the names of its layers in checkpoints are unknown",
        where=in_file(file, field),
    )


def _heads(raw: Config, file: str) -> Heads:
    """Megatron's settings of the attention."""
    query = as_integer(raw.get("num_attention_heads"), in_file(file, "num_attention_heads"), 1, _MOST)
    key = optional_integer(raw, "num_query_groups", file, 1, _MOST) or query
    size = optional_integer(raw, "kv_channels", file, 1, _MOST)
    hidden = as_integer(raw.get("hidden_size"), in_file(file, "hidden_size"), 1, _MOST)
    if query % key:
        raise ConfigError(
            f"{query} heads cannot be divided among {key} groups", where=in_file(file, "num_query_groups")
        )
    return Heads(query, key, size or max(1, hidden // query))


def _updates(
    module: str, a: LazyTensor, b: LazyTensor, settings: _Settings, scale: float | None
) -> Iterator[tuple[str, LowRank]]:
    found = _LAYER.fullmatch(module)
    parts = () if found is None else _MODULES.get(found[2], ())
    if found is None or not parts:
        raise UnsupportedUpdate("the name of this module in checkpoints is unknown", where=in_weights(module))
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
            "the number of heads in the fused query, key and value is in the base's config",
            where=in_weights(module),
            hint="pass it with --base",
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


def _notes(pairs: Mapping[str, Pair], tensors: Tensors, state: list[str], where: FindingLocation) -> Iterator[Finding]:
    for module, pair in pairs.items():
        if (pair.a is None) != (pair.b is None):
            present, absent = ("linear_out", "linear_in") if pair.a is None else ("linear_in", "linear_out")
            yield unpaired_factor(in_weights(module, file=where.file), present, absent)
    beside = sorted([*tensors.extras, *state])
    if tensors.container == "distcp":
        # Every such checkpoint has them, and Megatron's own loader passes over them.
        if beside:
            yield file_left_behind(where, beside)
    elif tensors.wrapper or beside:
        yield not_only_tensors(where, tensors.wrapper, beside)
