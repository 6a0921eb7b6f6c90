"""Output files of a size that the caller chose, instead of the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraformat.containers import CONTAINERS
from loraformat.errors import MergeError, UsageError
from loraformat.merger.plan.data import PlannedTensor, ShardPlan, nbytes_of


def resharded(shards: Sequence[ShardPlan], most_nbytes: int) -> tuple[tuple[ShardPlan, ...], str | None]:
    """The same tensors in their order, in files with at most `most_nbytes` bytes of tensor data each, and their index.

    A tensor that is larger has a file of its own. Names are those that transformers gives; one file has no index.

    Raises: MergeError (LF801): the output is not of safetensors. UsageError (LF021): no byte is allowed.
    """
    if most_nbytes < 1:
        raise UsageError(f"expected at least 1 byte, found {most_nbytes}", where="--max-shard-size")
    if any(CONTAINERS[shard.container].shares_storage for shard in shards):
        raise MergeError(
            "only safetensors outputs can be split", where="--max-shard-size", hint="add --container safetensors"
        )
    groups = list(_groups([tensor for shard in shards for tensor in shard.tensors], most_nbytes))
    edits = {edit.tensor: edit for shard in shards for edit in shard.edits}
    count, kind = len(groups), CONTAINERS[shards[0].container]
    divided = tuple(
        ShardPlan(
            source=shards[0].source,
            target=kind.file_name("model.x" if count == 1 else f"model-{number:05}-of-{count:05}.x"),
            container=kind.name,
            verbatim=False,
            tensors=group,
            metadata=dict(shards[0].metadata),
            edits=tuple(edits[tensor.name] for tensor in group if tensor.name in edits),
        )
        for number, group in enumerate(groups, 1)
    )
    return divided, kind.index_name if count > 1 else None


def _groups(tensors: Sequence[PlannedTensor], most_nbytes: int) -> Iterator[tuple[PlannedTensor, ...]]:
    group: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        nbytes = nbytes_of(tensor)
        if group and filled + nbytes > most_nbytes:
            yield tuple(group)
            group, filled = [], 0
        group.append(tensor)
        filled += nbytes
    yield tuple(group)
