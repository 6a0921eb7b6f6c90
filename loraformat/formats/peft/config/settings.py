"""Builds the adapter_config.json that describes the updates.

Source: peft 0.21.2, tuners/lora/config.py; utils/other.py `get_pattern_key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from loraformat.budget import Budget
from loraformat.diagnostics import NOWHERE
from loraformat.errors import ConfigError
from loraformat.formats.kit.scaling import Scaling
from loraformat.formats.kit.targets import target_names
from loraformat.formats.kit.update_slots import Slots, most_common, stated_alphas, stated_rank
from loraformat.formats.peft.patterns import PatternKeys, lookup
from loraformat.model.adapter import Adapter, AdapterConfig, module_of
from loraformat.model.bundle import Json
from loraformat.model.updates import LowRank

Number = TypeVar("Number", int, float)

_RECOMPUTED = frozenset(
    [
        *("alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules"),
        *("fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save"),
        *("peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
        "loraplus_lr_ratio",  # no field of PEFT's: another trainer's, which keeps it in a file of its own
    ]
)

_FRESH: dict[str, Json] = {
    "auto_mapping": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
}


def settings(adapter: Adapter, slots: Mapping[str, Slots], *, by_root: bool = True) -> dict[str, Json]:
    """The whole config: facts from the updates, free settings from a PEFT source.

    Settings that older versions of PEFT do not know are only there when they say something.

    Args:
        by_root: whether `use_rslora` may be written.
    """
    config = adapter.config
    layers = {module_of(weight): found.low_rank for weight, found in slots.items() if found.low_rank is not None}
    saved = saved_modules(slots)
    occasional: dict[str, Json] = {
        "lora_bias": any(found.dense is not None for found in slots.values()),
        "trainable_token_indices": _token_indices(config, slots),
        "use_dora": any(update.magnitude is not None for update in layers.values()),
    }
    return {
        **_free(config.raw),
        **_ranks_and_alphas(config.raw, layers, by_root=by_root),
        "base_model_name_or_path": config.base_model,
        "bias": _bias(slots, saved),
        "fan_in_fan_out": config.fan_in_fan_out or False,
        "modules_to_save": list[Json](saved) or None,
        "peft_type": "LORA",
        "revision": config.base_revision,
        "target_modules": list[Json](target_names(config, layers)),
        "task_type": config.task,
        **{name: value for name, value in occasional.items() if value},
    }


def _free(raw: Mapping[str, Json]) -> dict[str, Json]:
    if raw.get("peft_type") != "LORA":
        return dict(_FRESH)
    return {name: value for name, value in raw.items() if name not in _RECOMPUTED}


def saved_modules(slots: Mapping[str, Slots]) -> list[str]:
    """`modules_to_save`: modules with a weight of their own that no tied partner shares."""
    return sorted(
        {
            module_of(weight)
            for weight, found in slots.items()
            if found.replace is not None and not found.replace.follows_tie and not _is_shared(module_of(weight), slots)
        }
    )


def _is_shared(module: str, slots: Mapping[str, Slots]) -> bool:
    """Whether the module cannot be saved as a whole, because its weight is adapted or follows a tie."""
    weight = slots.get(f"{module}.weight")
    if weight is None:
        return False
    follows = weight.replace is not None and weight.replace.follows_tie
    return follows or weight.low_rank is not None or weight.rows is not None


def _bias(slots: Mapping[str, Slots], saved: list[str]) -> str:
    biases = [
        module_of(weight)
        for weight, found in slots.items()
        if weight.endswith(".bias") and found.replace is not None and module_of(weight) not in saved
    ]
    if not biases:
        return "none"
    layers = [slots.get(f"{module}.weight") for module in biases]
    return "lora_only" if all(layer is not None and layer.low_rank is not None for layer in layers) else "all"


def _ranks_and_alphas(raw: Mapping[str, Json], layers: Mapping[str, LowRank], *, by_root: bool) -> dict[str, Json]:
    preferred = [int(alpha) if float(alpha).is_integer() else alpha for alpha in stated_alphas(raw)]
    is_by_root = by_root and raw.get("use_rslora") is True and _by_root_is_exact(layers.values(), preferred)
    scaling = Scaling(by_root=is_by_root)
    ranks = {module: update.rank for module, update in layers.items()}
    alphas = {module: _alpha(update, scaling, preferred) for module, update in layers.items()}
    rank = most_common(ranks.values(), default=stated_rank(raw))
    alpha = most_common(alphas.values(), default=next(iter(preferred), float(rank)))
    return {
        "alpha_pattern": dict[str, Json](pattern(alphas, alpha)),
        "lora_alpha": alpha,
        "r": rank,
        "rank_pattern": dict[str, Json](pattern(ranks, rank)),
        "use_rslora": scaling.by_root,
    }


def _alpha(update: LowRank, scaling: Scaling, preferred: list[float]) -> float:
    assert update.scale is not None
    return scaling.alpha(update.scale, update.rank, preferred)


def _by_root_is_exact(updates: Iterable[LowRank], preferred: list[float]) -> bool:
    root = Scaling(by_root=True)
    return all(any(root.factor(alpha, update.rank) == update.scale for alpha in preferred) for update in updates)


def pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """`rank_pattern` or `alpha_pattern`: full module names for the values that differ from the default.

    PEFT sorts the keys, reads each as a regular expression for the end of a path and takes the first that matches.
    Where a plain name would also catch another module, all keys are anchored and escaped (PEFT 0.15 and later).
    """
    exceptions = {module: values[module] for module in sorted(values) if values[module] != default}
    if _decides(exceptions, values, default):
        return exceptions
    return {f"^{re.escape(module)}": value for module, value in exceptions.items()}


def _decides(exceptions: Mapping[str, Number], values: Mapping[str, Number], default: Number) -> bool:
    try:
        keys = PatternKeys(NOWHERE, list(exceptions), Budget())
        found = {module: lookup(exceptions, keys, module) for module in values}
    except ConfigError:
        return False
    return all(
        default == value if found[module] is None else found[module] == value for module, value in values.items()
    )


def _token_indices(config: AdapterConfig, slots: Mapping[str, Slots]) -> Json:
    rows = {
        module_of(weight): list[Json](found.rows.indices) for weight, found in slots.items() if found.rows is not None
    }
    if len(rows) == 1 and isinstance(config.raw.get("trainable_token_indices"), list):
        return next(iter(rows.values()))
    return dict[str, Json](rows)
