"""Fields known to older versions of PEFT, and configs with which they compute the same.

Source: tags v0.5.0 to v0.21.2 of huggingface/peft, tuners/lora/config.py, tuners/lora/layer.py, tuners/lora/model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from loraformat.budget import Budget
from loraformat.formats.kit.update_slots import Slots
from loraformat.model.bundle import Json
from loraformat.model.patterns.keys import OutOfSteps, PatternKeys
from loraformat.model.updates import LowRank

Version = tuple[int, int]

OLDEST: Version = (0, 5)

# First version with a field; all other fields that are written are older than OLDEST.
SINCE: dict[str, Version] = {
    "rank_pattern": (0, 6),
    "alpha_pattern": (0, 6),
    "megatron_config": (0, 7),
    "megatron_core": (0, 7),
    "loftq_config": (0, 7),
    "use_rslora": (0, 8),
    "use_dora": (0, 9),
    "layer_replication": (0, 10),
    "runtime_config": (0, 12),
    "exclude_modules": (0, 14),
    "eva_config": (0, 14),
    "lora_bias": (0, 14),
    "trainable_token_indices": (0, 15),
    "corda_config": (0, 15),
    "use_qalora": (0, 16),
    "qalora_group_size": (0, 16),
    "target_parameters": (0, 17),
    "peft_version": (0, 18),
    "alora_invocation_tokens": (0, 18),
    "arrow_config": (0, 18),
    "ensure_weight_tying": (0, 18),
    "lora_ga_config": (0, 19),
    "use_bdlora": (0, 19),
    "velora_config": (0, 20),
    "monteclora_config": (0, 20),
    "kasa_config": (0, 21),
}

_BEFORE = frozenset(
    [
        *("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r"),
        *("revision", "target_modules", "task_type"),
    ]
)

# Values that say nothing, though they are not empty.
_DEFAULTS: dict[str, Json] = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}
_SILENT = ("peft_version",)


def text_of(version: Version) -> str:
    """As the user wrote it: 0.10."""
    return ".".join(map(str, version))


def is_known(name: str, version: Version) -> bool:
    """Whether a PEFT of this version has the field."""
    return name in _BEFORE or SINCE.get(name, (9, 9)) <= version


def unknown_settings(settings: Mapping[str, Json], version: Version) -> list[str]:
    """Fields with something to say that this version does not know, sorted."""
    return sorted(
        name
        for name, value in settings.items()
        if not is_known(name, version) and value and name not in _SILENT and value != _DEFAULTS.get(name)
    )


def faults(slots: Mapping[str, Slots], layers: tuple[int, ...] | None, version: Version) -> Iterator[tuple[str, str]]:
    """(weight, what this version of PEFT cannot compute) for all that has no older spelling."""
    if layers is not None and version < (0, 10):
        yield "", "repeated layers (layer_replication, since 0.10)"
    for weight, found in slots.items():
        if found.rows is not None and version < (0, 15):
            yield weight, "trained rows (trainable_token_indices, since 0.15)"
        if found.dense is not None and version < (0, 14):
            yield weight, "a trained bias of lora_B (lora_bias, since 0.14)"
        elif found.dense is not None and version < (0, 16) and found.dense.scale != 1.0:
            yield weight, "a trained bias of lora_B with a factor (merged with it since 0.16)"
        if found.low_rank is not None:
            yield from ((weight, fault) for fault in _layer_faults(found.low_rank, version))


def _layer_faults(update: LowRank, version: Version) -> Iterator[str]:
    first = _first_version(update)
    if version < first[0]:
        yield f"{first[1]} (since {text_of(first[0])})"


def _first_version(update: LowRank) -> tuple[Version, str]:
    """The first version that loads and merges such an update."""
    axes, has_dora = len(update.kernel), update.magnitude is not None
    if axes in (1, 3):
        return ((0, 14), "a convolution along three axes") if axes == 3 else ((0, 15), "a convolution along one axis")
    if not has_dora:
        return OLDEST, ""
    if update.is_embedding:
        # Merged without its magnitude before.
        return (0, 16), "DoRA of an embedding"
    return ((0, 10), "DoRA of a convolution") if axes else ((0, 9), "DoRA")


def patterns_decide(settings: Mapping[str, Json], modules: Iterable[str], version: Version) -> bool:
    """Whether a PEFT of this version gives each module the rank and alpha that the patterns mean.

    Before 0.15 a key counts where the module's path ends with a dot and the key, one key decides about both, and what
    no key fits is looked up by its whole path. So full paths are right unless one is the end of another.
    """
    keys = [*_keys(settings, "rank_pattern"), *_keys(settings, "alpha_pattern")]
    if not keys or version >= (0, 15):
        return True
    if version < SINCE["rank_pattern"] or any(key.startswith("^") for key in keys):
        return False
    lookup = PatternKeys(list(dict.fromkeys(keys)), Budget())
    try:
        return all(set(lookup.plain_matches(module)) <= {module} for module in modules)
    except OutOfSteps:
        return False


def _keys(settings: Mapping[str, Json], name: str) -> list[str]:
    found = settings.get(name)
    return list(found) if isinstance(found, dict) else []


def downgraded(settings: Mapping[str, Json], version: Version) -> dict[str, Json]:
    """The settings that this version knows; the initialization, which no loader needs, is the plain one."""
    kept = {name: value for name, value in settings.items() if is_known(name, version)}
    return {**kept, "init_lora_weights": True}
