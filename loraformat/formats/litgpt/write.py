"""LitGPT, Adapter to files: what `litgpt merge_lora` loads.

Source: litgpt 0.5.13, litgpt/lora.py `LoRALinear`, `LoRAQKVLinear`, `create_lora_linear`; litgpt/scripts/merge_lora.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraformat.diagnostics import Finding
from loraformat.errors import FormatError
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.blocks import chosen_rows, stacked, zeros
from loraformat.formats.kit.folder import bundle_of, lost_beside, tensor_file, yaml_file
from loraformat.formats.kit.losses import (
    padded_ranks,
    unknown_scale,
    unstated_in_file,
    unsupported_update,
    unsupported_updates,
)
from loraformat.formats.kit.normalize import uniform
from loraformat.formats.kit.scaling import MAX_RANK, Scaling
from loraformat.formats.kit.update_slots import Slots, all_slots, faults_of, low_ranks_of, unsaid, unstated_fields
from loraformat.formats.litgpt.config import MODEL, OWN_FILES, PARTS, SETTINGS, WEIGHTS, LitConfig
from loraformat.formats.litgpt.model_config import Sizes, config_of, model_config, sizes_of
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, Json
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank
from loraformat.naming import family_of

_WHOSE = "LitGPT"
# The groups of modules that LitGPT adapts in all layers or in none.
_FLAGS = ("query", "key", "value", "projection", "mlp", "head")
_ATTENTION = _FLAGS[:3]


@dataclass(frozen=True, slots=True)
class _Part:
    """What one pair of LitGPT's adapts, or a third of one.

    Attributes:
        module: LitGPT's; `attn.qkv` stands three times.
        flag: the group it belongs to.
        weight: the checkpoint's.
        rows: of the checkpoint's weight, which this is; None for all.
        shape: (out, in).
    """

    module: str
    flag: str
    weight: str
    rows: tuple[int, ...] | None
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Model:
    """The base: its settings in LitGPT's words, and all that can be adapted in it."""

    settings: Mapping[str, Json]
    parts: tuple[_Part, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each of the checkpoint's weights."""
        heights: dict[str, int] = {}
        for part in self.parts:
            heights[part.weight] = heights.get(part.weight, 0) + part.shape[0]
        return {part.weight: (heights[part.weight], part.shape[1]) for part in self.parts}


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
    """What LitGPT cannot hold: anything but low-rank updates of linear layers, with one rank and one scale."""
    if not options.base.config:
        what = "an adapter of an unknown base (pass --base: its config.json has the layers),"
        yield unsupported_update("", what, _WHOSE)
        return
    try:
        model = _model(adapter, options)
    except FormatError as error:
        yield unsupported_update("", f"({error.message}) an adapter", _WHOSE)
        return
    shapes = model.shapes
    faults = list(faults_of(adapter, lambda weight, slots: _fault(slots, shapes.get(weight))))
    yield from unsupported_updates(faults, _WHOSE)
    layers = low_ranks_of(adapter)
    if not layers:
        yield unsupported_update("", "an adapter without low-rank updates", _WHOSE)
    if len({update.up.dtype for update in layers.values()}) > 1:
        # LitGPT's merge takes that of the first tensor for the whole model.
        yield unsupported_update("", "an adapter in several dtypes (--dtype float32 makes it one)", _WHOSE)
    unknown = [weight for weight, update in layers.items() if update.scale is None]
    if unknown:
        yield unknown_scale("", unknown)
    even, findings = uniform(adapter)
    yield from findings
    if layers and not faults:
        absent = [part.weight for part in _adapted(model, layers) if part.weight not in layers]
        if absent:
            yield padded_ranks("", absent, next(iter(low_ranks_of(even).values())).rank)
    yield from _tokenizer(adapter)
    yield from lost_beside(adapter, _dropped(adapter), OWN_FILES)


def _tokenizer(adapter: Adapter) -> Iterator[Finding]:
    present = adapter.tokenizer
    wanted = [] if {"tokenizer.json", "tokenizer.model"} & set(present) else ["tokenizer.json or tokenizer.model"]
    wanted += [] if "tokenizer_config.json" in present else ["tokenizer_config.json"]
    if wanted:
        text = f"litgpt merge_lora refuses a folder without {' and '.join(wanted)}: copy them from the base into it"
        yield unstated_in_file("", text)


def _fault(slots: Slots, expected: tuple[int, int] | None) -> str | None:
    update = slots.low_rank
    if update is None or slots.updates() != (update,):
        kinds = {"replace": "a full weight", "rows": "trained rows", "dense": "a dense delta"}
        return next(words for name, words in kinds.items() if getattr(slots, name) is not None)
    if update.is_embedding:
        return "a low-rank update of an embedding"
    if update.kernel:
        return "a low-rank update of a convolution"
    if update.magnitude is not None:
        return "a DoRA magnitude"
    if update.up.dtype is not update.down.dtype or update.up.dtype not in _DTYPES:
        return f"a pair in {update.up.dtype.torch_name} and {update.down.dtype.torch_name} (--dtype float32 rounds it)"
    if expected is None:
        return "an update of a weight that it does not adapt"
    if (update.up.shape[0], update.down.shape[1]) != expected:
        return f"an update whose shape is not {expected}, as in the base's config.json,"
    return None if 1 <= update.rank <= MAX_RANK else f"rank {update.rank}"


_DTYPES = (DType.F64, DType.F32, DType.F16, DType.BF16)


def _is_own(adapter: Adapter) -> bool:
    return "lora_r" in adapter.config.raw


def _dropped(adapter: Adapter) -> list[str]:
    names = unsaid(adapter.config, "base_model", container="torch")
    raw = adapter.config.raw
    return names if _is_own(adapter) else names + [name for name in unstated_fields(raw) if name != "lora_dropout"]


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
    """A folder with lit_model.pth.lora, hyperparameters.yaml and model_config.yaml.

    Raises: AssertionError: `losses` has an error-level finding.
    """
    model = _model(adapter, options)
    even, _ = uniform(adapter)
    layers = {weight: slots.low_rank for weight, slots in all_slots(even) if slots.low_rank is not None}
    rank = next(iter(layers.values())).rank
    dtype = next(iter(layers.values())).up.dtype
    pairs: dict[str, list[tuple[LazyTensor, LazyTensor]]] = {}
    adapted = _adapted(model, layers)
    for part in adapted:
        pairs.setdefault(part.module, []).append(_factors(part, layers.get(part.weight), rank, dtype))
    entries: dict[str, LazyTensor] = {}
    for module, factors in pairs.items():
        entries[f"{module}.lora_A"] = stacked([a for a, _ in factors])
        entries[f"{module}.lora_B"] = stacked([b for _, b in factors])
    return bundle_of(
        [
            tensor_file(WEIGHTS, "torch", entries, wrapper=("model",)),
            yaml_file(SETTINGS, _settings(even, {part.flag for part in adapted}, rank)),
            yaml_file(MODEL, dict(model.settings)),
        ],
        adapter,
    )


def _factors(part: _Part, update: LowRank | None, rank: int, dtype: DType) -> tuple[LazyTensor, LazyTensor]:
    """(A, B) of a part; zeros where the adapter leaves it alone."""
    if update is None:
        return zeros((rank, part.shape[1]), dtype), zeros((part.shape[0], rank), dtype)
    return update.down, update.up if part.rows is None else chosen_rows(update.up, part.rows)


def _adapted(model: _Model, layers: Mapping[str, LowRank]) -> list[_Part]:
    """The parts of every group of which one is adapted."""
    flags = {part.flag for part in model.parts if part.weight in layers}
    return [part for part in model.parts if part.flag in flags]


def _settings(adapter: Adapter, flags: set[str], rank: int) -> dict[str, Json]:
    config = adapter.config
    scale = next(iter(low_ranks_of(adapter).values())).scale
    assert scale is not None
    dropout = config.raw.get("lora_dropout")
    return {
        **(config.raw if _is_own(adapter) else {}),
        "checkpoint_dir": _checkpoint_dir(config.base_model),
        "lora_alpha": Scaling().alpha(scale, rank),
        "lora_dropout": dropout if isinstance(dropout, (int, float)) else 0.0,
        "lora_r": rank,
        **{f"lora_{flag}": flag in flags for flag in _FLAGS},
    }


def _checkpoint_dir(base_model: str | None) -> str:
    """Where `litgpt download` puts a model of the Hub; a path as it is."""
    if base_model is None:
        return "checkpoints"
    return f"checkpoints/{base_model}" if base_model.count("/") == 1 and base_model[0] not in "./~" else base_model


def _model(adapter: Adapter, options: WriteOptions) -> _Model:
    """The base of an adapter.

    Raises:
        UnsupportedUpdate (LF013): a model, or a setting of it, of which LitGPT's settings are not known.
        ConfigError (LF103): a setting that cannot be used.
    """
    config = config_of(options.base.config)
    settings, sizes = model_config(config, adapter.config.base_model), sizes_of(config)
    family = family_of(str(settings["name"]), str(settings["mlp_class_name"]))
    heads, groups, size = (settings[name] for name in ("n_head", "n_query_groups", "head_size"))
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    assert isinstance(size, int)
    lit = LitConfig(
        raw={},
        family=family,
        rank=None,
        alpha=None,
        enabled=None,
        heads=heads,
        groups=groups,
        head_size=size,
        base_model=None,
    )
    parts = [part for layer in range(sizes.layers) for part in _layer(f"transformer.h.{layer}", lit, sizes)]
    head = _Part("lm_head", "head", f"{family.head}.weight", None, (sizes.vocabulary, sizes.hidden))
    return _Model(settings, (*parts, head))


def _layer(path: str, lit: LitConfig, sizes: Sizes) -> Iterator[_Part]:
    qkv = f"{path}.attn.qkv"
    for number, (flag, name, height) in enumerate(zip(_ATTENTION, PARTS, lit.sizes, strict=True)):
        weight, rows = lit.family.module(f"{path}.{name}"), None
        if lit.family.joined:
            weight = f"{lit.family.layers}.{path.rpartition('.')[2]}.{lit.family.joined}"
            rows = tuple(row for first, end in lit.runs(number) for row in range(first, end))
        yield _Part(qkv, flag, f"{weight}.weight", rows, (height, sizes.hidden))
    yield _one(f"{path}.attn.proj", "projection", lit, (sizes.hidden, lit.sizes[0]))
    wide, narrow = (sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)
    names: Sequence[str] = ("fc",) if "mlp.fc" in lit.family.modules else ("fc_1", "fc_2")
    for name in names:
        yield _one(f"{path}.mlp.{name}", "mlp", lit, wide)
    yield _one(f"{path}.mlp.proj", "mlp", lit, narrow)


def _one(module: str, flag: str, lit: LitConfig, shape: tuple[int, int]) -> _Part:
    return _Part(module, flag, f"{lit.family.module(module)}.weight", None, shape)
