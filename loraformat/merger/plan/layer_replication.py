"""The base as it will be written: with replicated layers or a task head, and the resulting config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraformat.errors import MergeError
from loraformat.matching import replicated, with_task_head
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint
from loraformat.naming import levels_of

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def as_written(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base with the layers and the head that the adapters were trained on; itself where they are its own.

    Raises: as `_repeated`.
    """
    base = _repeated(base, adapters)
    for adapter in adapters:
        base = with_task_head(base, adapter)
    return base


def task_settings(base: Checkpoint) -> Iterator[tuple[tuple[str, ...], Json]]:
    """The changes to config.json that the head of a task needs, as (path of keys, value)."""
    for key, value in base.task.config.items() if base.task is not None else ():
        yield (key,), value


def _repeated(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base with the layers that the adapters were trained on; the base itself where they are its own.

    Raises: MergeError (LF801): the adapters were trained on different stacks, or config.json lists something for each
        layer, which cannot be told for the new ones.
    """
    stacks = {adapter.config.layers for adapter in adapters}
    if base.layers or stacks <= {None}:
        return base
    if len(stacks) > 1:
        raise MergeError("the adapters were trained on different stacks of layers (layer_replication)", where="merge")
    listed = [key for _, level in levels_of(base.config) for key in level if key == "layer_types"]
    if listed:
        raise MergeError(
            "config.json lists layer_types, which cannot be extended to the replicated layers", where="merge"
        )
    return replicated(base, stacks.pop())


def layer_counts(base: Checkpoint) -> Iterator[tuple[tuple[str, ...], int]]:
    """The changes to config.json that a base with repeated layers needs, as (path of keys, value)."""
    if not base.layers:
        return
    for path, level in levels_of(base.config):
        yield from (((*path, key), len(base.layers)) for key in COUNT_KEYS if key in level)
