"""PEFT, Adapter to files: a clean folder of the current layout.

Source: peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`; config.py `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.budget import Budget
from loraformat.diagnostics import Finding
from loraformat.formats.kit import factors
from loraformat.formats.kit.base import DEFAULT_OPTIONS, WriteOptions
from loraformat.formats.kit.folder import bundle_of, json_file, lost_beside, tensor_file
from loraformat.formats.kit.losses import dropped_setting, unknown_scale, unsupported_update, unsupported_updates
from loraformat.formats.kit.normalize import uniform
from loraformat.formats.kit.scaling import MAX_RANK
from loraformat.formats.kit.update_slots import Slots, all_slots, faults_of, slots_of, unsaid, unstated_fields
from loraformat.formats.peft.components import losses_of, write_components
from loraformat.formats.peft.config.settings import saved_modules, settings
from loraformat.formats.peft.config.versions import (
    SINCE,
    Version,
    downgraded,
    faults,
    patterns_decide,
    text_of,
    unknown_settings,
)
from loraformat.formats.peft.keys import CONFIG, OWN_FILES, PREFIX, WEIGHTS
from loraformat.formats.peft.layers import rows_are_private
from loraformat.formats.peft.patterns import Inside
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Bundle
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:
    """What PEFT's layout, or PEFT itself, or the asked version of it, cannot hold."""
    if adapter.config.pipeline is not None:
        yield from losses_of(adapter, lambda part: _losses(part, options))
        # A fingerprint is that of the whole pipeline, and the folders are of its components.
        dropped = unsaid(adapter.config, "base_model", "base_revision", container="")
        yield from lost_beside(adapter, [*dropped, *_header(adapter)], ())
    else:
        yield from _losses(adapter, options)


def _header(adapter: Adapter) -> list[str]:
    """What a header of the source says, for which the folders have no place; configs of PEFT are made again."""
    return sorted(name for name, value in adapter.config.raw.items() if isinstance(value, str) and name != "format")


def _losses(adapter: Adapter, options: WriteOptions) -> Iterator[Finding]:
    slots = {weight: slots_of(updates) for weight, updates in adapter.updates.items()}
    sound = {weight: found for weight, found in slots.items() if found is not None}
    yield from unsupported_updates(faults_of(adapter, lambda weight, found: _fault(weight, found, sound)), "PEFT")
    yield from _mixtures(sound)
    unknown = [
        weight
        for weight, found in sound.items()
        if any(update is not None and update.scale is None for update in (found.low_rank, found.dense))
    ]
    if unknown:
        yield unknown_scale("", unknown)
    yield from lost_beside(adapter, _dropped(adapter.config, options.container or "safetensors"), OWN_FILES)
    if options.peft_version is not None and len(sound) == len(slots) and not unknown:
        yield from _version_losses(adapter, sound, options.peft_version)


def _version_losses(adapter: Adapter, slots: dict[str, Slots], version: Version) -> Iterator[Finding]:
    yield from unsupported_updates(faults(slots, adapter.config.layers, version), f"PEFT {text_of(version)}")
    even, findings = _for_version(adapter, version)
    yield from findings
    names = unknown_settings(settings(even, dict(all_slots(even)), by_root=version >= SINCE["use_rslora"]), version)
    dropped = [name for name in names if name not in _FACTS]
    if dropped:
        yield dropped_setting("", text_of(version), dropped)


# Fields that say what the updates are; where a version lacks one, `faults` or the folding has seen to it.
_FACTS = ("alpha_pattern", "lora_bias", "rank_pattern", "trainable_token_indices", "use_dora", "use_rslora")


def _for_version(adapter: Adapter, version: Version | None) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter as this version can state its ranks and factors: with one of each where patterns would not do."""
    if version is None:
        return adapter, ()
    slots = dict(all_slots(adapter))
    stated = settings(adapter, slots, by_root=version >= SINCE["use_rslora"])
    modules = [module_of(weight) for weight, found in slots.items() if found.low_rank is not None]
    return (adapter, ()) if patterns_decide(stated, modules, version) else uniform(adapter)


def _fault(base_weight: str, slots: Slots, others: dict[str, Slots]) -> str | None:
    update = slots.low_rank
    is_private = slots.replace is not None and not slots.replace.follows_tie
    if slots.rows is not None and not base_weight.endswith(".weight"):
        return "rows of a parameter that is not called weight"
    if slots.rows is not None and (update is not None or is_private):
        return "trained rows together with another update of the table"
    if slots.dense is not None and not _is_factor_bias(base_weight, slots.dense, others):
        return "a dense delta that is not the bias of lora_B"
    return None if update is None else _low_rank_fault(base_weight, update, is_private=is_private)


def _low_rank_fault(base_weight: str, update: LowRank, *, is_private: bool) -> str | None:
    if not base_weight.endswith(".weight"):
        return "a low-rank update of a parameter that is not called weight"
    if is_private:
        return "a low-rank update of a module that is saved as a whole"
    if update.magnitude is not None and update.magnitude.axis != (0 if update.is_embedding else 1):
        return "a DoRA magnitude along the other axis"
    return None if 1 <= update.rank <= MAX_RANK else f"rank {update.rank}"


def _is_factor_bias(base_weight: str, delta: Dense, others: dict[str, Slots]) -> bool:
    """Whether PEFT's `lora_bias` gives this delta: on the bias of a plain low-rank module, with the same scale."""
    module = module_of(base_weight)
    layer = others.get(f"{module}.weight")
    update = layer.low_rank if layer is not None else None
    return (
        base_weight == f"{module}.bias"
        and update is not None
        and not update.is_embedding
        and update.magnitude is None
        and update.scale == delta.scale
    )


def _mixtures(slots: dict[str, Slots]) -> Iterator[Finding]:
    low_ranks = {weight: found.low_rank for weight, found in slots.items() if found.low_rank is not None}
    if not low_ranks:
        yield unsupported_update("", "an adapter without low-rank updates", "PEFT")
    if len({update.magnitude is None for update in low_ranks.values()}) > 1:
        plain = next(weight for weight, update in low_ranks.items() if update.magnitude is None)
        yield unsupported_update(plain, "a plain update among DoRA updates", "PEFT")
    rows = {weight: found.rows for weight, found in slots.items() if found.rows is not None}
    for weight, each in rows.items():
        if each.follows_tie is rows_are_private(rows.values()):
            kind = "that a tied partner shares" if each.follows_tie else "that a tied partner does not share"
            yield unsupported_update(weight, f"a set of rows {kind}", "PEFT")
    saved = Inside(saved_modules(slots), Budget())
    for weight in low_ranks:
        for name in sorted(saved.of(module_of(weight))):
            if module_of(weight) != name:
                yield unsupported_update(weight, f"a low-rank update inside the saved module {name}", "PEFT")


def _dropped(config: AdapterConfig, container: str) -> list[str]:
    names = unsaid(config, "base_model", "base_revision", "task", container=container)
    return names if config.raw.get("peft_type") == "LORA" else names + unstated_fields(config.raw)


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:
    """A folder that PEFT loads; of a pipeline, one for each component.

    Args:
        options: container "safetensors" (default) or "torch".
    Raises: AssertionError: `losses` has an error-level finding.
    """
    if adapter.config.pipeline is not None:
        return write_components(adapter, lambda part: _write(part, options))
    return _write(adapter, options)


def _write(adapter: Adapter, options: WriteOptions) -> Bundle:
    container, version = options.container or "safetensors", options.peft_version
    adapter, _ = _for_version(adapter, version)
    slots = dict(all_slots(adapter))
    has_base_layers = version is None or version >= _BASE_LAYERS
    entries: dict[str, LazyTensor] = {}
    for base_weight, found in slots.items():
        named = _tensors(base_weight, found, slots if has_base_layers else {})
        entries.update({f"{PREFIX}{name}": tensor for name, tensor in named})
    weights = tensor_file(WEIGHTS[container], container, entries)
    config = settings(adapter, slots, by_root=version is None or version >= SINCE["use_rslora"])
    return bundle_of([json_file(CONFIG, config if version is None else downgraded(config, version)), weights], adapter)


# The first version that keeps the weights of wrapped modules under `base_layer`.
# Source: peft 0.7.0, tuners/lora/layer.py `LoraLayer`.
_BASE_LAYERS = (0, 7)


def _tensors(base_weight: str, found: Slots, slots: dict[str, Slots]) -> Iterator[tuple[str, LazyTensor]]:
    module = module_of(base_weight)
    if found.replace is not None:
        yield _whole_name(base_weight, slots), found.replace.value
    if found.rows is not None:
        yield f"{module}.token_adapter.trainable_tokens_delta", found.rows.values
    if found.low_rank is not None:
        yield from _layer(module, found.low_rank)
    if found.dense is not None:
        yield f"{module}.lora_B.bias", found.dense.delta


def _whole_name(base_weight: str, slots: dict[str, Slots]) -> str:
    """Where a wrapped module keeps the base's tensor: under `base_layer`."""
    module, _, parameter = base_weight.rpartition(".")
    layer = slots.get(f"{module}.weight")
    if layer is not None and layer.low_rank is not None:
        return f"{module}.base_layer.{parameter}"
    if layer is not None and layer.rows is not None:
        return f"{module}.token_adapter.base_layer.{parameter}"
    return base_weight


def _layer(module: str, update: LowRank) -> Iterator[tuple[str, LazyTensor]]:
    a, b = factors.as_file(update)
    if update.is_embedding:
        yield f"{module}.lora_embedding_A", a
        yield f"{module}.lora_embedding_B", b
    else:
        yield f"{module}.lora_A.weight", a
        yield f"{module}.lora_B.weight", b
    if update.magnitude is not None:
        vector = update.magnitude.vector
        if update.kernel and len(vector.shape) == 1:
            vector = vector.reshape(1, *vector.shape, *(1 for _ in update.kernel))
        yield f"{module}.lora_magnitude_vector", vector
