"""A base whose layers are repeated, as an adapter with replicated layers was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loraformat.model.checkpoint import Checkpoint, StoredTensor

# A config of some bytes must not make millions of names; no model that was trained with replicated layers comes near.
_MOST_TENSORS = 500_000
_LAYER = re.compile(r"^(.*?\.)?(layers|layer|h|blocks)\.(\d{1,9})\.(.*)$", re.DOTALL)


def replicated(base: Checkpoint, layers: tuple[int, ...] | None) -> Checkpoint:
    """The base with its stack of layers replaced: layer n holds the tensors of stored layer `layers[n]`.

    A base that has been replicated already, or `layers` None, comes back as it is. So does a base that lacks one of the
    layers, or would have half a million tensors: the updates of new layers then match nothing.

    Source: peft 0.21.2, tuners/tuners_utils.py `replicate_layers`.
    """
    if layers is None or base.layers:
        return base
    copies: dict[int, list[int]] = {}
    for number, source in enumerate(layers):
        copies.setdefault(source, []).append(number)
    sources = [_layer(name) for name in base.tensors]
    count = sum(1 if source is None else len(copies.get(source, ())) for source in sources)
    if copies.keys() - set(sources) or count > _MOST_TENSORS:
        return base
    names = {name: list(_names(name, copies)) for name in base.tensors}
    tensors = {new: _own(base.tensors[old]) for old, several in names.items() for new in several}
    files = {
        name: replace(file, names=tuple(new for old in file.names for new in names.get(old, ())))
        for name, file in base.files.items()
    }
    weights = {new: replace(base.weights[old], name=new) for old in base.weights for new in names[old]}
    return replace(base, tensors=tensors, files=files, layers=layers, weights=weights)


def _names(name: str, copies: Mapping[int, list[int]]) -> Iterator[str]:
    found = _LAYER.match(name)
    if found is None:
        yield name
        return
    before, stack, number, after = found.groups()
    for new in copies.get(int(number), ()):
        yield f"{before or ''}{stack}.{new}.{after}"


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return None if found is None else int(found.group(3))


def _own(tensor: StoredTensor) -> StoredTensor:
    """Copies of a layer are trained apart, so they share nothing."""
    return replace(tensor, storage=None)
