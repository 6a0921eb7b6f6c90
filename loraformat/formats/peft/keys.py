"""How PEFT calls tensors: `base_model.model.<module path>.<part>`.

Source: peft 0.21.2, utils/save_and_load.py `get_peft_model_state_dict`; tuners/*/layer.py `adapter_layer_names`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loraformat.diagnostics import Finding, FindingLocation, listed
from loraformat.errors import FormatError
from loraformat.formats.kit.findings import foreign_name_part
from loraformat.formats.kit.pairs.spelling import WRAPPERS
from loraformat.model.tensors import LazyTensor

CONFIG = "adapter_config.json"
WEIGHTS = {"safetensors": "adapter_model.safetensors", "torch": "adapter_model.bin"}
OWN_FILES = (CONFIG, *WEIGHTS.values())

PREFIX = "base_model.model."

_MAY_BE_WRAPPED = re.compile("_orig_mod|_wrapped_module").search

_MODULE_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B_bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_diag": "diagonal",
    "token_adapter.trainable_tokens_delta": "rows",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}

_NAMED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

_COPIES = ("modules_to_save", "original_module")
_WHOLES = frozenset(["plain", "base_layer", *_COPIES])

# What an adapter's name may follow, where it was left in the name of a tensor.
_BEFORE_A_NAME = frozenset([*_NAMED, "trainable_tokens_delta", "modules_to_save"])


class Key(NamedTuple):
    """What a tensor name says.

    Attributes:
        owner: a module path for the parts of an adapter layer, a weight's name for the others.
        part: "A", "B", "B_bias", "embedding_A", "embedding_B", "magnitude", "rows", "hada_…", "lokr_…"; or "plain",
            "base_layer", "modules_to_save", "original_module" for a whole weight.
        adapter: the adapter's name where it was left in the key.
        has_prefix: whether `base_model.model.` was there, once.
        wrappers: what else was removed from the front or the inside.
    """

    owner: str
    part: str
    adapter: str | None = None
    has_prefix: bool = True
    wrappers: tuple[str, ...] = ()


def parse(name: str, parts: Mapping[str, str] = _MODULE_PARTS) -> Key:
    """The meaning of a tensor name; never fails: an unknown one is a "plain" weight.

    Args:
        parts: ends of the names of an adapter layer's tensors, of one to three components, and what they are.
    """
    path, has_prefix, wrappers = _without_prefix(name)
    # Nearly every name, and there may be hundreds of thousands: a module, a part of two components, nothing between.
    before, _, last = path.rpartition(".")
    module, _, layer = before.rpartition(".")
    part = parts.get(f"{layer}.{last}")
    if part and module and module.rpartition(".")[2] not in _BEFORE_A_NAME:
        return Key(module, part, None, has_prefix, wrappers)
    components, adapter = _without_adapter(path.split("."))
    for length in (3, 2, 1):
        part = parts.get(".".join(components[-length:]))
        if part and len(components) > length:
            return Key(".".join(components[:-length]), part, adapter, has_prefix, wrappers)
    owner, part = _whole(components)
    return Key(owner, part, adapter, has_prefix, wrappers)


def is_whole(key: Key) -> bool:
    """Whether a tensor is a weight of the model, or a copy of one, and no part of an adapter layer."""
    return key.part in _WHOLES


def _without_prefix(name: str) -> tuple[str, bool, tuple[str, ...]]:
    rest = name[len(PREFIX) :]
    if name.startswith(PREFIX) and not rest.startswith(PREFIX) and not _MAY_BE_WRAPPED(rest):
        return rest, True, ()
    components = name.split(".")
    wrappers = tuple(sorted({f"{part}." for part in components if part in WRAPPERS}))
    path = ".".join(part for part in components if part not in WRAPPERS)
    if path.startswith(f"module.{PREFIX}"):
        path, wrappers = path.removeprefix("module."), (*wrappers, "module.")
    bare = path.removeprefix(PREFIX)
    has_prefix = bare != path
    while bare.startswith(PREFIX):
        bare, wrappers = bare.removeprefix(PREFIX), (*wrappers, f"a second {PREFIX}")
    return bare, has_prefix, wrappers


def _without_adapter(components: list[str]) -> tuple[list[str], str | None]:
    """`lora_A.default.weight` → `lora_A.weight`, "default"."""
    match components:
        case [*path, layer, name, ("weight" | "bias") as last] if layer in _NAMED:
            kept = [layer, last] if layer in ("lora_A", "lora_B") else [layer]
            return [*path, *kept], name
        case [*path, layer, name] if layer in _NAMED and name not in ("weight", "bias"):
            return [*path, layer], name
        case [*path, "token_adapter", "trainable_tokens_delta", name]:
            return [*path, "token_adapter", "trainable_tokens_delta"], name
        case [*path, "modules_to_save", name, last]:
            return [*path, "modules_to_save", last], name
    return components, None


def _whole(components: list[str]) -> tuple[str, str]:
    match components:
        case [*path, "token_adapter", "base_layer", last] | [*path, "base_layer", last]:
            return ".".join([*path, last]), "base_layer"
        case [*path, copy, last] if copy in _COPIES:
            return ".".join([*path, last]), copy
    return ".".join(components), "plain"


@dataclass(frozen=True, slots=True)
class Sorted:
    """The tensors of a file by meaning.

    Attributes:
        modules: module path → part → tensor.
        weights: weight's name → "plain", "base_layer", "modules_to_save", "original_module" → tensor.
        names: (owner, part) → name in the file.
        notes: LF221 for what was removed from names.
    """

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    weights: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)


def sort(entries: Mapping[str, LazyTensor], where: FindingLocation, parts: Mapping[str, str] = _MODULE_PARTS) -> Sorted:
    """The tensors by what they belong to; `parts` as for `parse`.

    Raises:
        FormatError (LF012): two names mean the same tensor, or several adapters lie in one file.
    """
    keys = {name: parse(name, parts) for name in entries}
    _require_one_adapter(keys, where)
    found = Sorted()
    for name, tensor in entries.items():
        key = keys[name]
        owner, part = meaning = key.owner, key.part
        other = found.names.setdefault(meaning, name)
        if other is not name:
            raise FormatError(f"{name} and {other} mean the same tensor", where=where, hint="keep only one of them")
        (found.weights if part in _WHOLES else found.modules).setdefault(owner, {})[part] = tensor
    found.notes.extend(_foreign(keys, where))
    return found


def _require_one_adapter(keys: Mapping[str, Key], where: FindingLocation) -> None:
    adapters = sorted({key.adapter for key in keys.values() if key.adapter is not None})
    if len(adapters) > 1:
        message = f"the file holds {len(adapters)} adapters: {listed(adapters, 8)}"
        raise FormatError(message, where=where, hint="save each into a folder of its own")


def _foreign(keys: Mapping[str, Key], where: FindingLocation) -> Iterator[Finding]:
    parts = [wrapper for key in keys.values() for wrapper in key.wrappers]
    parts += [f"the adapter name {key.adapter}" for key in keys.values() if key.adapter is not None]
    for part in sorted(set(parts)):
        yield foreign_name_part(where, part, parts.count(part))
    bare = sum(not key.has_prefix for key in keys.values())
    if bare:
        yield foreign_name_part(where, f"no {PREFIX}", bare)
