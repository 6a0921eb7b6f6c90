"""The native format, Adapter to files: always version 1."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Finding
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.folder import bundle_of, json_file, lost_beside, tensor_file
from loraformat.formats.kit.losses import unknown_scale, unsupported_updates
from loraformat.formats.kit.scaling import MAX_RANK, Scaling
from loraformat.formats.kit.targets import target_names
from loraformat.formats.kit.update_slots import (
    Slots,
    all_slots,
    faults_of,
    most_common,
    stated_alphas,
    stated_rank,
    unstated_fields,
    vocabulary_of,
)
from loraformat.formats.native.config import BY_RANK, BY_ROOT, CARRIED
from loraformat.formats.native.names import CONFIG, OWN_FILES, TABLES, WEIGHTS, is_valid
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Bundle, File, Json
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Rows

_OWNED = frozenset(
    [
        *("alpha", "alpha_exceptions", "base_model", "base_vocab_size", "difference_scale", "dtype", "fan_in_fan_out"),
        *("format_version", "method", "rank", "rank_exceptions", "rows", "scaling", "target_modules", "task", "tied"),
        "vocab_size",
    ]
)


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:  # noqa: ARG001
    """What version 1 cannot hold."""
    yield from unsupported_updates(faults_of(adapter, _fault), "native version 1")
    unknown = [weight for weight, updates in adapter.updates.items() if any(_lacks_scale(update) for update in updates)]
    if unknown:
        yield unknown_scale("", unknown)
    raw = adapter.config.raw
    dropped = [] if _is_native(adapter.config) else [name for name in unstated_fields(raw) if name not in CARRIED]
    yield from lost_beside(adapter, dropped, OWN_FILES)


def _lacks_scale(update: object) -> bool:
    return getattr(update, "scale", 1.0) is None


def _fault(base_weight: str, slots: Slots) -> str | None:
    update = slots.low_rank
    if not is_valid(f"{base_weight}.replacement"):
        return "a weight with this name"
    if update is None:
        return None
    if not base_weight.endswith(".weight"):
        return "a low-rank update of a parameter that is not called weight"
    if update.magnitude is not None and update.magnitude.axis != (0 if update.is_embedding else 1):
        return "a DoRA magnitude along the other axis"
    return None if 1 <= update.rank <= MAX_RANK else f"rank {update.rank}"


def _is_native(config: AdapterConfig) -> bool:
    return "rank" in config.raw and "peft_type" not in config.raw


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
    """A folder of version 1.

    Args:
        options: container "safetensors" (default) or "torch", for both weight files.
    Raises: AssertionError: `losses` has an error-level finding.
    """
    container = options.container or "safetensors"
    weights: dict[str, LazyTensor] = {}
    tables: dict[str, LazyTensor] = {}
    for base_weight, slots in all_slots(adapter):
        _place(base_weight, slots, weights, tables)
    files: list[File] = [json_file(CONFIG, _config(adapter)), tensor_file(WEIGHTS[container], container, weights)]
    if tables:
        files.append(tensor_file(TABLES[container], container, tables))
    return bundle_of(files, adapter)


def _place(base_weight: str, slots: Slots, weights: dict[str, LazyTensor], tables: dict[str, LazyTensor]) -> None:
    if slots.replace is not None:
        if slots.replace.follows_tie:
            tables[base_weight] = slots.replace.value
        else:
            weights[f"{base_weight}.replacement"] = slots.replace.value
    if slots.rows is not None:
        (tables if slots.rows.follows_tie else weights)[f"{base_weight}.rows"] = slots.rows.values
    if slots.low_rank is not None:
        weights.update(_factors(module_of(base_weight), slots.low_rank))
    if slots.dense is not None:
        weights[f"{base_weight}.difference"] = slots.dense.delta


def _factors(module: str, update: LowRank) -> dict[str, LazyTensor]:
    form = "lora_embedding" if update.is_embedding else "lora"
    a, b = factors.as_file(update)
    named = {f"{module}.{form}_A": a, f"{module}.{form}_B": b}
    if update.magnitude is not None:
        named[f"{module}.lora_magnitude"] = update.magnitude.vector
    return named


def _config(adapter: Adapter) -> dict[str, Json]:
    config = adapter.config
    is_native = _is_native(config)
    kept = {name: value for name, value in config.raw.items() if (name not in _OWNED if is_native else name in CARRIED)}
    optional: dict[str, Json] = {
        "base_model": _base(config),
        "base_vocab_size": config.base_vocab_size,
        "difference_scale": _difference_scale(adapter),
        "dtype": _dtype(adapter),
        "fan_in_fan_out": config.fan_in_fan_out,
        "rows": {weight: _row_numbers(slots.rows) for weight, slots in all_slots(adapter) if slots.rows is not None},
        "target_modules": _targets(adapter),
        "task": config.task,
        "tied": _tied(config),
        "vocab_size": config.vocab_size or vocabulary_of(adapter.updates),
    }
    stated = {name: value for name, value in optional.items() if value is not None and value != {}}
    return {**kept, "format_version": 1, "method": "lora", **_ranks(adapter), **stated}


def _ranks(adapter: Adapter) -> dict[str, Json]:
    """rank, alpha, the scaling rule, and the exceptions from the first two."""
    updates = {module_of(weight): slots.low_rank for weight, slots in all_slots(adapter) if slots.low_rank is not None}
    raw = adapter.config.raw
    scaling = Scaling(by_root=raw.get("scaling") == BY_ROOT or raw.get("use_rslora") is True)
    preferred = stated_alphas(raw)
    rank = most_common((update.rank for update in updates.values()), default=stated_rank(raw))
    alphas: dict[str, float] = {}
    for module, update in updates.items():
        # Of several alphas that give a scale, the one that a module before has, so that what is read is written again.
        alphas[module] = _alpha(update, scaling, [*preferred, *dict.fromkeys(alphas.values())])
    alpha = most_common(alphas.values(), default=next(iter(preferred), float(rank)))
    ranks: dict[str, Json] = {module: update.rank for module, update in updates.items() if update.rank != rank}
    others: dict[str, Json] = {module: value for module, value in alphas.items() if value != alpha}
    return {
        "rank": rank,
        "alpha": alpha,
        "scaling": BY_ROOT if scaling.by_root else BY_RANK,
        **({"rank_exceptions": ranks} if ranks else {}),
        **({"alpha_exceptions": others} if others else {}),
    }


def _alpha(update: LowRank, scaling: Scaling, preferred: list[float]) -> float:
    assert update.scale is not None
    return scaling.alpha(update.scale, update.rank, preferred)


def _base(config: AdapterConfig) -> Json:
    named = {"name": config.base_model, "revision": config.base_revision, "fingerprint": config.base_fingerprint}
    stated: dict[str, Json] = {name: value for name, value in named.items() if value is not None}
    return stated or None


def _difference_scale(adapter: Adapter) -> Json:
    scales = {weight: slots.dense.scale for weight, slots in all_slots(adapter) if slots.dense is not None}
    return {weight: scale for weight, scale in scales.items() if scale != 1.0}


def _dtype(adapter: Adapter) -> Json:
    names = [slots.low_rank.down.dtype.torch_name for _, slots in all_slots(adapter) if slots.low_rank is not None]
    return most_common(names, default="") or None


def _row_numbers(rows: Rows | None) -> Json:
    assert rows is not None
    first = rows.indices[0] if rows.indices else 0
    if rows.indices == tuple(range(first, first + len(rows.indices))):
        return first
    return list(rows.indices)


def _targets(adapter: Adapter) -> Json:
    modules = [module_of(weight) for weight, slots in all_slots(adapter) if slots.low_rank is not None]
    return list[Json](target_names(adapter.config, modules)) or None


def _tied(config: AdapterConfig) -> Json:
    if config.tied is None:
        return None
    return [list(group) for group in config.tied] if config.tied else False
