"""Which names of a base are one table, and what each of them gets where an update reaches one of them.

Source: transformers 5.23.0, `_tied_weights_keys`, `tie_weights`; peft 0.21.2, utils/other.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraformat.merger.verify.reference.sources import factor_rows
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Replace, Rows, Update
from loraformat.naming import architecture_of, tied_names

_INPUTS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"})
_INPUTS |= {"token_embedding"}
_OUTPUTS = frozenset({"lm_head", "embed_out", "output", "output_layer", "head", "decoder", "generator_lm_head"})
_OUTPUTS |= {"proj_out"}
_FLAGS = ("tie_word_embeddings", "weight_tying")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_NESTED = "language_model."
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Table:
    """One table: all of its names, and the name under which its values stand in the base."""

    names: tuple[str, ...]
    stored: str


def tables_of(tensors: Mapping[str, StoredTensor], config: Mapping[str, Json], wanted: Iterable[str]) -> list[Table]:
    """The tables of a base that have several names, of which one at least is stored.

    Args: wanted: weights that adapters update, of which one may be a head that is not stored.
    """
    tables = _one_storage(tensors)
    taken = {name for table in tables for name in table.names}
    says = [
        level[flag]
        for level in (config, config.get("text_config"))
        if isinstance(level, Mapping)
        for flag in _FLAGS
        if isinstance(level.get(flag), bool)
    ]
    if not config or (says and not any(says)):
        return tables
    declared = tied_names(config)
    if declared is not None:
        found = [table for table in _declared(declared, tensors) if taken.isdisjoint(table.names)]
        if found or not declared:
            return tables + found
    inputs = [name for name in tensors if _layer(name) in _INPUTS and name not in taken]
    if len(inputs) == 1:
        heads = _heads(inputs[0], tensors, config, wanted, is_said=bool(says))
        tables += [Table((inputs[0], *sorted(heads)), inputs[0])] if heads else []
    return tables


def _one_storage(tensors: Mapping[str, StoredTensor]) -> list[Table]:
    """Names of a `.pt` file that are one tensor."""
    names: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.storage is not None:
            place = (tensor.file, tensor.storage, tensor.offset, tensor.shape, tensor.strides)
            names.setdefault(place, []).append(name)
    several = [sorted(found, key=lambda name: _layer(name) not in _INPUTS) for found in names.values()]
    return [Table(tuple(found), found[0]) for found in several if len(found) > 1]


def _declared(declared: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> list[Table]:
    found = []
    for source in sorted(set(declared.values())):
        names = (source, *sorted(name for name, other in declared.items() if other == source))
        found += [Table(names, stored) for stored in [name for name in names if name in tensors][:1]]
    return found


def _heads(
    table: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Json], wanted: Iterable[str], *, is_said: bool
) -> set[str]:
    """The heads that share an input table, of a class whose own table is not known."""
    is_nested = table.startswith(f"{_NESTED}model.")
    named = {f"{_NESTED}{name}" if is_nested and name == "lm_head.weight" else name for name in wanted}
    heads = {name for name in named if _layer(name) in _OUTPUTS and name not in tensors}
    if is_said:
        stored = [n for n, tensor in tensors.items() if _layer(n) in _OUTPUTS and tensor.shape == tensors[table].shape]
        heads |= set(stored) if len(stored) == 1 else set()
    if not heads and (architecture_of(config) or "").endswith(_GENERATES):
        head = "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"
        heads = {f"{_NESTED}{head}" if is_nested else head}
    return heads


def _layer(name: str) -> str:
    *_, layer, kind = ("", *name.split("."))
    return layer if kind == "weight" else ""


def joined(tables: Iterable[Table], is_same: Callable[[str, str], bool]) -> list[Table]:
    """Each table once, whatever adapters say of its names, without stored names that hold other values.

    Args: is_same: whether two stored tensors hold the same bytes.
    """
    names: dict[str, list[str]] = {}
    for table in tables:
        known = names.setdefault(table.stored, [])
        known += [name for name in table.names if name not in known]
    return [Table(tuple(n for n in found if is_same(stored, n)), stored) for stored, found in names.items()]


def follows(update: Update) -> bool:
    """Whether an update is one of the table rather than of the name that it was given."""
    return isinstance(update, (Replace, Rows)) and update.follows_tie


def stays_one(chains: Sequence[Sequence[Update]]) -> bool:
    """Whether the names of a table stay together: all updates follow it, and all names that have any have the same."""
    if not all(follows(update) for chain in chains for update in chain):
        return False
    first = chains[0]
    return all(len(chain) == len(first) and all(map(_are_equal, first, chain)) for chain in chains[1:])


def _are_equal(one: Update, other: Update) -> bool:
    if isinstance(one, Replace) and isinstance(other, Replace):
        return _are_same(one.value, other.value)
    are_rows = isinstance(one, Rows) and isinstance(other, Rows)
    return are_rows and one.indices == other.indices and _are_same(one.values, other.values)  # type: ignore[union-attr]


def _are_same(one: LazyTensor, other: LazyTensor) -> bool:
    if one is other or one.shape != other.shape:
        return one is other
    count = one.shape[0] if one.shape else 1
    steps = [(low, min(low + _ROWS_AT_ONCE, count)) for low in range(0, count, _ROWS_AT_ONCE)]
    return all(bool((factor_rows(one, *rows) == factor_rows(other, *rows)).all()) for rows in steps)
