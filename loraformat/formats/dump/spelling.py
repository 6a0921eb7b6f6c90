"""How hand-written code spells its factors, and which names make a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.model.tensors import LazyTensor

# Longest first: ".lora.lora_A" also ends in ".lora_A".
_SPELLINGS = (
    (".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B"),
    (".lora.lora_A", ".lora.lora_B"),
    (".lora.lora_a", ".lora.lora_b"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora.A", ".lora.B"),
    (".lora.a", ".lora.b"),
    (".lora_A", ".lora_B"),
    (".lora_a", ".lora_b"),
)
_TAILS = (".default.weight", ".weight", "")

# Where wrappers keep the weight that they adapt.
_BASE_COPIES = (
    ".linear.weight",
    ".original_layer.weight",
    ".base_layer.weight",
    ".parametrizations.weight.original",
    ".weight",
)


@dataclass(slots=True)
class Pair:
    """The factors of one module as the file has them.

    Attributes:
        a, b: the tensors; None where one is missing.
        names: their names in the file.
        is_embedding: the spelling says so.
        base_shape: shape of the adapted weight, where the file holds a copy.
    """

    a: LazyTensor | None = None
    b: LazyTensor | None = None
    names: list[str] = field(default_factory=list)
    is_embedding: bool = False
    base_shape: tuple[int, ...] | None = None


def pairs_of(entries: Mapping[str, LazyTensor]) -> tuple[dict[str, Pair], dict[str, str]]:
    """(module path → its factors, name → module for copies of the adapted weights)."""
    pairs: dict[str, Pair] = {}
    for name, tensor in entries.items():
        found = _factor(name)
        if found is None:
            continue
        module, side, is_embedding = found
        pair = pairs.setdefault(module, Pair(is_embedding=is_embedding))
        pair.names.append(name)
        if side == 0:
            pair.a = tensor
        else:
            pair.b = tensor
    copies: dict[str, str] = {}
    for module, pair in pairs.items():
        for ending in _BASE_COPIES:
            if f"{module}{ending}" in entries:
                pair.base_shape = entries[f"{module}{ending}"].shape
                copies[f"{module}{ending}"] = module
    return pairs, copies


def _factor(name: str) -> tuple[str, int, bool] | None:
    """(module path, 0 for A or 1 for B, whether it is an embedding's), or None for another tensor."""
    for tail in _TAILS:
        stem = name.removesuffix(tail)
        if tail and stem == name:
            continue
        for spelling in _SPELLINGS:
            for side, ending in enumerate(spelling):
                if stem.endswith(ending) and len(stem) > len(ending):
                    return stem.removesuffix(ending), side, "embedding" in ending
    return None
