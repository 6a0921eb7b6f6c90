"""A base whose layers are repeated, by names alone.

Source: peft 0.21.2, tuners/lora/config.py `layer_replication`; tuners/tuners_utils.py `replicate_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import StoredTensor

_MOST_LAYERS = 100_000  # in one run
_STACKS = ("layers", "layer", "h", "blocks")


def stack_of(adapter: Adapter) -> tuple[int, ...] | None:
    """Which layer of the base each layer of the trained model copies, from the file's own config where it has one."""
    pairs = adapter.config.raw.get("layer_replication")
    if adapter.config.layers is None or not isinstance(pairs, list):
        return adapter.config.layers
    found: list[int] = []
    for pair in pairs:
        first, end = (number if isinstance(number, int) else 0 for number in (pair if isinstance(pair, list) else ()))
        found += range(first, min(end, first + _MOST_LAYERS))
    return tuple(found)


def with_layers(tensors: Mapping[str, StoredTensor], stack: Sequence[int]) -> dict[str, StoredTensor]:
    """The tensors of the model that has layer `stack[n]` as its layer n; what belongs to no layer stays."""
    repeated: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for new in _names(name, stack):
            repeated[new] = replace(tensor, storage=None)
    return repeated


def _names(name: str, stack: Sequence[int]) -> Iterator[str]:
    parts = name.split(".")
    for at, number in enumerate(parts[1:], start=1):
        if parts[at - 1] in _STACKS and number.isdecimal() and at + 1 < len(parts):
            for new, old in enumerate(stack):
                if old == int(number):
                    yield ".".join([*parts[:at], str(new), *parts[at + 1 :]])
            return
    yield name
