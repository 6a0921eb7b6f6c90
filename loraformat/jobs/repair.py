"""Repairs that need the base: copies of its weights, and names under another prefix."""

from __future__ import annotations

from dataclasses import replace

from loraformat.diagnostics import Finding, in_file, listed
from loraformat.formats.kit.repairs import dropped_copies, renamed_modules, whole_number
from loraformat.matching import prefix_of
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tensors import has_equal_values
from loraformat.model.updates import Replace, Update

_WHOLE = ("lora_alpha", "r")


def mend(adapter: Adapter, base: Checkpoint | None, to: str) -> tuple[Adapter, tuple[Finding, ...]]:
    """The adapter as it should have been, and each repair (LF903 to LF905).

    Args:
        to: the format that is written; only PEFT's readers care for whole numbers.
    """
    repairs = [
        whole_number(in_file("adapter_config.json", name), value)
        for name in (_WHOLE if to == "peft" else ())
        if isinstance(value := adapter.config.raw.get(name), float) and value.is_integer()
    ]
    if base is None:
        return adapter, tuple(repairs)
    before, after = prefix_of(adapter, base)
    if before or after:
        repairs.append(renamed_modules("", len(adapter.updates), before, after))
        adapter = _renamed(adapter, before, after)
    copies = [
        weight for weight, chain in adapter.updates.items() if any(_is_copy(weight, each, base) for each in chain)
    ]
    if copies:
        repairs.append(dropped_copies("", f"left out {listed(copies)}: identical to the base's"))
        adapter = replace(adapter, updates=_without(adapter, set(copies)))
    return adapter, tuple(repairs)


def _renamed(adapter: Adapter, before: str, after: str) -> Adapter:
    def name(weight: str) -> str:
        return after + weight.removeprefix(before)

    updates = dict(sorted((name(weight), chain) for weight, chain in adapter.updates.items()))
    declared = {name(weight): rank for weight, rank in adapter.config.declared_ranks.items()}
    return replace(adapter, updates=updates, config=replace(adapter.config, declared_ranks=declared, targets=None))


def _without(adapter: Adapter, copies: set[str]) -> dict[str, tuple[Update, ...]]:
    kept = {
        weight: tuple(each for each in chain if weight not in copies or not isinstance(each, Replace))
        for weight, chain in adapter.updates.items()
    }
    return {weight: chain for weight, chain in kept.items() if chain}


def _is_copy(weight: str, update: Update, base: Checkpoint) -> bool:
    """Whether an update replaces a weight by what the base has there, in the base's dtype."""
    stored = base.weights.get(weight)
    if not isinstance(update, Replace) or stored is None or stored.shape != update.value.shape:
        return False
    return has_equal_values(update.value.to(stored.dtype), stored)
