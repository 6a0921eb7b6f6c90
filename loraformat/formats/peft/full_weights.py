"""Whole weights in a PEFT file: saved modules, saved and resized embeddings, trained biases, and PEFT's own copies."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.diagnostics import in_file
from loraformat.formats.kit.findings import redundant_copy, undeclared_replacement
from loraformat.formats.peft.config.fields import PeftConfig
from loraformat.formats.peft.keys import CONFIG, Sorted
from loraformat.formats.peft.layers import Built
from loraformat.model.adapter import module_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Replace

# VeLoRA's projections and MonteCLoRA's samplers.
# Source: peft 0.21.2, tuners/lora/variants.py `VeloraLinearVariant`, `MontecloraLinearVariant`.
_TRAINING_ONLY = ("lora_velora", "lora_monteclora")


def read_wholes(found: Sorted, config: PeftConfig, built: Built) -> None:
    """Adds what the whole weights do to `built`.

    A module of `modules_to_save` is a copy of its own: a tied partner keeps the old values, unless
    `ensure_weight_tying`. Any other whole weight overwrites the base's tensor, which a tied partner shares.
    """
    _set_aside(found, built)
    if not found.weights:
        return
    copies: list[str] = []
    undeclared: list[str] = []
    wrapped = {module_of(weight) for weight in (*built.layer_weights(), *built.rows)}
    for weight, parts in found.weights.items():
        module = module_of(weight)
        is_saved = bool(config.saved.of(module))
        is_known = is_saved or weight.endswith((".weight", ".bias"))
        chosen = _chosen(weight, parts, is_wrapped=module in wrapped) if is_known and not _is_adapters(weight) else None
        for part in parts:
            if part != chosen:
                (copies if chosen and _is_copy(part) else built.unclaimed).append(found.names[weight, part])
        if chosen is None:
            continue
        built.replaces[weight] = Replace(parts[chosen], follows_tie=not is_saved or config.ensures_tying)
        if not is_saved and chosen == "plain" and not _is_expected(weight, parts[chosen], config):
            undeclared.append(weight)
    if copies:
        built.notes.append(
            redundant_copy(
                "", sorted(copies), "PEFT ignores these copies too, and loads the tensor with the plain name"
            )
        )
    if undeclared:
        built.notes.append(undeclared_replacement(in_file(CONFIG), sorted(undeclared)))


def _set_aside(found: Sorted, built: Built) -> None:
    """Takes out what only training needs, so that it is neither a weight nor unclaimed."""
    weights = [weight for weight in found.weights if any(c.startswith(_TRAINING_ONLY) for c in weight.split("."))]
    names = [found.names[weight, part] for weight in weights for part in found.weights.pop(weight)]
    if names:
        built.notes.append(redundant_copy("", sorted(names), "only training uses them, not merging"))


def _is_adapters(weight: str) -> bool:
    """Whether the name is a part of an adapter layer that is not known here, and so no weight of the base."""
    return any(component.startswith(("lora_", "hada_", "lokr_")) for component in weight.split("."))


def _is_copy(part: str) -> bool:
    return part in ("modules_to_save", "original_module")


def _chosen(weight: str, parts: Mapping[str, LazyTensor], *, is_wrapped: bool) -> str | None:
    """Which of the tensors of one weight counts, or None.

    A plain `.weight` of a wrapped module has no place in PEFT's model and is ignored there; a plain bias is what PEFT
    before 0.7 wrote.
    """
    if "base_layer" in parts:
        return "base_layer"
    if "plain" in parts and not (is_wrapped and weight.endswith(".weight")):
        return "plain"
    return "modules_to_save" if "modules_to_save" in parts else None


def _is_expected(weight: str, tensor: LazyTensor, config: PeftConfig) -> bool:
    """Whether the config, or PEFT's habit of saving embeddings, explains a whole weight."""
    if weight.endswith(".bias"):
        return config.bias != "none"
    in_a_block = any(component.isdigit() for component in weight.split("."))
    return weight.endswith(".weight") and len(tensor.shape) == 2 and not in_a_block
