"""Statistics of an adapter, from its headers only."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from loraformat.model.adapter import Adapter, UpdateGroup, module_of
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank, Replace, Rows, Update, kind_of, rank_of, scale_of, tensors

_Key = TypeVar("_Key", bound=Hashable)

# Nine digits are more layers than any model has, and keep a hostile name from becoming a huge integer.
_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|\Z)").search


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Statistics of an adapter.

    Attributes:
        base_model, task, targets: as the config states them.
        base_revision, base_fingerprint: of the base, from the config or a stamp; None if unstated.
        weights: base weights with at least one update.
        modules: modules that own those weights.
        layers: numbers of the blocks, ascending: the first number of each path.
        module_kinds: last name of the module path that is not a number ("q_proj") → weights.
        update_kinds: name of the kind → updates.
        ranks: rank → low-rank updates.
        scales: scale → updates that have one; None for updates whose scale is unknown.
        dtypes: safetensors name → tensors.
        tensors, parameters, nbytes: of all updates; a tensor shared by several weights is counted once.
        parameters_by_kind: kind of update, as in `update_kinds` → elements; adds up to `parameters`.
        parameters_by_weight: base weight → elements of its own updates.
        parameters_by_layer: layer → elements; weights outside the numbered blocks are left out.
        has_dora, has_convolutions, has_embeddings, has_replacements, has_rows: whether there is such an update.
        vocab_size, new_rows: rows of the embedding tables, and how many of them the base lacks; None for unknown.
        unclaimed: tensors that the reader did not recognize.
        family: the image or video model, judging by the names; None for other adapters, "" for an unknown model.
        components: component of the pipeline → weights; {} for an adapter of one model.
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
    parameters_by_kind: Mapping[str, int]
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
    base_revision: str | None = None
    base_fingerprint: str | None = None
    family: str | None = None
    components: Mapping[str, int] = field(default_factory=dict)


def summarize(adapter: Adapter) -> Summary:
    """The adapter in figures, from names, shapes and dtypes alone."""
    updates = [(group.update, len(group.weights)) for group in adapter.update_groups]
    distinct = _distinct(
        (tensor, kind_of(each).name)
        for chain in adapter.updates.values()
        for each in chain
        for _, tensor in tensors(each)
    )
    low_rank = [update for update, _ in updates if isinstance(update, LowRank)]
    modules = [module_of(name) for name in adapter.updates]
    by_weight = _by_weight(adapter)
    by_layer = _by_layer(by_weight)
    config = adapter.config
    return Summary(
        base_model=config.base_model,
        base_revision=config.base_revision,
        base_fingerprint=config.base_fingerprint,
        task=config.task,
        targets=config.targets,
        weights=len(adapter.updates),
        modules=len(set(modules)),
        layers=tuple(by_layer),
        module_kinds=_counted((_last_name(module), 1) for module in modules),
        update_kinds=_counted((kind_of(update).name, count) for update, count in updates),
        ranks=_counted((rank, count) for update, count in updates if (rank := rank_of(update)) is not None),
        scales=_counted((scale_of(update), count) for update, count in updates if kind_of(update).has_scale),
        dtypes=_counted((dtype.safetensors, count) for (dtype, _, _), count in distinct.items()),
        tensors=sum(distinct.values()),
        parameters=sum(math.prod(shape) * count for (_, shape, _), count in distinct.items()),
        nbytes=sum(math.prod(shape) * dtype.itemsize * count for (dtype, shape, _), count in distinct.items()),
        parameters_by_kind=_counted((kind, math.prod(shape) * count) for (_, shape, kind), count in distinct.items()),
        parameters_by_weight=by_weight,
        parameters_by_layer=by_layer,
        has_dora=any(update.magnitude is not None for update in low_rank),
        has_convolutions=any(update.kernel for update in low_rank),
        has_embeddings=_has_embeddings(adapter),
        has_replacements=any(isinstance(update, Replace) for update, _ in updates),
        has_rows=any(isinstance(update, Rows) for update, _ in updates),
        vocab_size=config.vocab_size,
        new_rows=_new_rows(config.vocab_size, config.base_vocab_size),
        unclaimed=len(adapter.unclaimed),
        family=None if config.pipeline is None else config.pipeline.family,
        components=_counted((adapter.component_of(weight), 1) for weight in adapter.updates if config.pipeline),
    )


def layer_of(name: str) -> int | None:
    """The first number among the components of a dotted path: which block a weight belongs to; None for no block."""
    found = _NUMBER(name)
    return int(found[1]) if found else None


def parameters_of(update: Update) -> int:
    """Elements of all tensors of an update."""
    return sum(tensor.numel for _, tensor in tensors(update))


def _by_weight(adapter: Adapter) -> dict[str, int]:
    totals = dict.fromkeys(sorted(adapter.updates), 0)
    for group in adapter.update_groups:
        parameters = parameters_of(group.update)
        for name in group.weights:
            totals[name] += parameters
    return totals


def _distinct(found: Iterator[tuple[LazyTensor, str]]) -> Counter[tuple[DType, tuple[int, ...], str]]:
    """Dtype, shape and kind of update → how many different tensors have them; two that read the same bytes are one."""
    forms = {(tensor.read, tensor.shape): (tensor.dtype, tensor.shape, kind) for tensor, kind in found}
    return Counter(forms.values())


def _counted(items: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    """Item → how often in all, in ascending order, None last."""
    counts: Counter[_Key] = Counter()
    for item, count in items:
        counts[item] += count
    return dict(sorted(counts.items(), key=lambda pair: (pair[0] is None, 0 if pair[0] is None else pair[0])))


def _last_name(module: str) -> str:
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), module)


def _by_layer(by_weight: Mapping[str, int]) -> dict[int, int]:
    totals: Counter[int] = Counter()
    for name, parameters in by_weight.items():
        layer = layer_of(name)
        if layer is not None:
            totals[layer] += parameters
    return dict(sorted(totals.items()))


def _has_embeddings(adapter: Adapter) -> bool:
    return any(
        isinstance(group.update, Rows)
        or (isinstance(group.update, LowRank) and group.update.is_embedding)
        or _is_table(group)
        for group in adapter.update_groups
    )


def _is_table(group: UpdateGroup) -> bool:
    is_matrix = isinstance(group.update, Replace) and len(group.update.shape) == 2
    return is_matrix and any("emb" in name.lower() for name in group.weights)


def _new_rows(vocab_size: int | None, base_vocab_size: int | None) -> int | None:
    return None if vocab_size is None or base_vocab_size is None else vocab_size - base_vocab_size
