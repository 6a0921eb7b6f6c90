"""What the headers of an adapter say, counted: no value is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from loraformat.model.adapter import Adapter, module_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    FACTORS,
    FromBase,
    Hadamard,
    LowRank,
    Replace,
    Rows,
    Update,
    tensors_of,
)

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """An adapter in figures.

    Attributes:
        base_model, task, targets: as the config states them.
        weights: base weights with at least one update.
        modules: modules that own those weights.
        layers: numbers of the blocks, ascending: the first number of each path.
        module_kinds: last component of the module path ("q_proj") → weights.
        update_kinds: see `kind_of` → updates.
        ranks: rank → low-rank updates.
        scales: scale → updates that have one; None for updates whose scale nobody stated.
        dtypes: safetensors name → tensors.
        tensors, parameters, nbytes: of all updates; a tensor that serves several weights counts once.
        parameters_by_weight: base weight → elements of its own updates.
        parameters_by_layer: layer → elements; weights outside the numbered blocks are left out.
        has_dora, has_convolutions, has_embeddings, has_replacements, has_rows: whether there is such an update.
        vocab_size, new_rows: rows of the embedding tables, and how many of them the base lacks; None for unknown.
        unclaimed: tensors that the reader did not understand.
    """

    base_model: str | None
    task: str | None
    targets: tuple[str, ...] | str | None
    weights: int
    modules: int
    layers: tuple[int, ...]
    module_kinds: Mapping[str, int]
    update_kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: Mapping[float | None, int]
    dtypes: Mapping[str, int]
    tensors: int
    parameters: int
    nbytes: int
    parameters_by_weight: Mapping[str, int]
    parameters_by_layer: Mapping[int, int]
    has_dora: bool
    has_convolutions: bool
    has_embeddings: bool
    has_replacements: bool
    has_rows: bool
    vocab_size: int | None
    new_rows: int | None
    unclaimed: int


def summarize(adapter: Adapter) -> Summary:
    """The adapter in figures, from names, shapes and dtypes alone."""
    updates = [update for chain in adapter.updates.values() for update in chain]
    tensors = _distinct(tensor for update in updates for _, tensor in tensors_of(update))
    low_rank = [update for update in updates if isinstance(update, LowRank)]
    by_weight = {name: _parameters(chain) for name, chain in adapter.updates.items()}
    by_layer = _by_layer(by_weight)
    config = adapter.config
    return Summary(
        base_model=config.base_model,
        task=config.task,
        targets=config.targets,
        weights=len(adapter.updates),
        modules=len({module_of(name) for name in adapter.updates}),
        layers=tuple(by_layer),
        module_kinds=_counted(module_of(name).rpartition(".")[2] for name in adapter.updates),
        update_kinds=_counted(kind_of(update) for update in updates),
        ranks=_counted(rank for update in updates if (rank := rank_of(update)) is not None),
        scales=_counted(scale_of(update) for update in updates if has_scale(update)),
        dtypes=_counted(tensor.dtype.safetensors for tensor in tensors),
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        parameters_by_weight=dict(sorted(by_weight.items())),
        parameters_by_layer=by_layer,
        has_dora=any(update.magnitude is not None for update in low_rank),
        has_convolutions=any(update.kernel for update in low_rank),
        has_embeddings=_has_embeddings(adapter),
        has_replacements=any(isinstance(update, Replace) for update in updates),
        has_rows=any(isinstance(update, Rows) for update in updates),
        vocab_size=config.vocab_size,
        new_rows=_new_rows(config.vocab_size, config.base_vocab_size),
        unclaimed=len(adapter.unclaimed),
    )


def layer_of(name: str) -> int | None:
    """The first number among the components of a dotted path: which block a weight belongs to; None for no block."""
    # Nine digits are more layers than any model has, and keep a hostile name from becoming a huge integer.
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit() and len(part) < 10), None)


def kind_of(update: Update) -> str:
    """Its kind in a word: "low-rank" or "dora", "from-base", else the name of its class in lower case."""
    if isinstance(update, LowRank):
        return "low-rank" if update.magnitude is None else "dora"
    return "from-base" if isinstance(update, FromBase) else type(update).__name__.lower()


def has_scale(update: Update) -> bool:
    """Whether the kind of update is multiplied by a scale at all: replacements and factors are not."""
    return not isinstance(update, (Replace, Rows, FromBase, *FACTORS))


def scale_of(update: Update) -> float | None:
    """The factor really applied; None where nobody stated it, or where the kind has none."""
    return None if isinstance(update, (Replace, Rows, FromBase, *FACTORS)) else update.scale


def rank_of(update: Update) -> int | None:
    """The rank of a low-rank update, or of either product of a LoHa; None for the other kinds."""
    if isinstance(update, LowRank):
        return update.rank
    if isinstance(update, Hadamard):
        return update.down1.shape[0] if update.down1.shape else 0
    return None


def parameters_of(update: Update) -> int:
    """Elements of all tensors of an update."""
    return sum(tensor.numel for _, tensor in tensors_of(update))


def _parameters(chain: Iterable[Update]) -> int:
    return sum(parameters_of(update) for update in chain)


def _distinct(tensors: Iterator[LazyTensor]) -> list[LazyTensor]:
    return list(dict.fromkeys(tensors))


def _counted(items: Iterable[_Key]) -> dict[_Key, int]:
    """Item → how often, in ascending order, None last."""
    counts = Counter(items)
    return dict(sorted(counts.items(), key=lambda pair: (pair[0] is None, 0 if pair[0] is None else pair[0])))


def _by_layer(by_weight: Mapping[str, int]) -> dict[int, int]:
    totals: Counter[int] = Counter()
    for name, parameters in by_weight.items():
        layer = layer_of(name)
        if layer is not None:
            totals[layer] += parameters
    return dict(sorted(totals.items()))


def _has_embeddings(adapter: Adapter) -> bool:
    return any(
        isinstance(update, Rows) or (isinstance(update, LowRank) and update.is_embedding) or _is_table(name, update)
        for name, chain in adapter.updates.items()
        for update in chain
    )


def _is_table(name: str, update: Update) -> bool:
    return isinstance(update, Replace) and len(update.shape) == 2 and "emb" in name.lower()


def _new_rows(vocab_size: int | None, base_vocab_size: int | None) -> int | None:
    return None if vocab_size is None or base_vocab_size is None else vocab_size - base_vocab_size
