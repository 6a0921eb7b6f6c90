"""The weights of a checkpoint and how their values are read, through files that are opened once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from loraformat.containers.rows import read_rows, read_rows_into
from loraformat.errors import UnsupportedUpdate
from loraformat.model.checkpoint import BaseWeight, StoredTensor
from loraformat.storage.base import Source


class BaseWeights(Mapping[str, BaseWeight]):
    """Name → weight; each is made when it is asked for, since a base may have hundreds of thousands."""

    def __init__(self, store: Source, tensors: Mapping[str, StoredTensor]) -> None:
        self._store, self._tensors = store, tensors

    def __getitem__(self, name: str) -> BaseWeight:
        return weight_of(self._store, name, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ComponentWeights(Mapping[str, BaseWeight]):
    """The weights of all components of a pipeline; names begin with the component's."""

    def __init__(self, components: Mapping[str, Mapping[str, BaseWeight]]) -> None:
        self._components = components

    def __getitem__(self, name: str) -> BaseWeight:
        component, _, weight = name.partition(".")
        return replace(self._components[component][weight], name=name)

    def __iter__(self) -> Iterator[str]:
        return (f"{component}.{name}" for component, weights in self._components.items() for name in weights)

    def __len__(self) -> int:
        return sum(map(len, self._components.values()))


def weight_of(store: Source, name: str, stored: StoredTensor) -> BaseWeight:
    """A weight that is stored as one tensor; nothing is read."""
    return BaseWeight(
        name=name,
        parts=(stored,),
        shape=stored.shape,
        dtype=stored.dtype,
        read=partial(read_rows, store, stored),
        read_into=partial(read_rows_into, store, stored) if stored.strides is None else None,
        as_matrix=lambda row_axes: weight_of(store, name, _as_matrix(stored, row_axes)),
    )


def _as_matrix(stored: StoredTensor, row_axes: int) -> StoredTensor:
    """A stack of matrices as one matrix, whose rows are those of all of them; for one leading axis, as it is.

    Raises: UnsupportedUpdate (LF013): the view of a `.pt` file has no such rows.
    """
    if row_axes == 1:
        return stored
    strides = stored.strides
    if strides is not None and strides[0] != strides[1] * stored.shape[1]:
        raise UnsupportedUpdate("a stack of experts that is not stored contiguously", where="merge")
    shape = (stored.shape[0] * stored.shape[1], *stored.shape[2:])
    return replace(stored, shape=shape, strides=None if strides is None else strides[1:])
