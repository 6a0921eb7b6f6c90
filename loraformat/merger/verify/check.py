"""The output read back before it gets its name, and compared with the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

from loraformat.containers import open_weights, read_rows
from loraformat.engine import one_thread_each, open_engine
from loraformat.errors import MergeError
from loraformat.merger.apply import blocks_of
from loraformat.merger.copies import Inputs, columns_of, copies_views
from loraformat.merger.plain import is_plain, reads_with_torch
from loraformat.merger.plan import Edit, MergePlan, ShardPlan
from loraformat.merger.steps import Steps
from loraformat.merger.verify.compare import compare_rows
from loraformat.merger.verify.safetensors_library import check_with_library
from loraformat.merger.windows import Limits, unit_of, windows
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType
from loraformat.storage import LocalStore, digest_of_range

_SAMPLES = 32
_PLAIN_ROWS = 16  # of a plain edit, which stay in the cache of a processor through all that numpy does with them
_BLOCK_NBYTES = 1 << 20
_TASK_NBYTES = 32 << 20

_Task = Callable[[], None]


def check_output(
    plan: MergePlan,
    inputs: Inputs,
    output: LocalStore,
    *,
    full: bool,
    digests: Mapping[str, str] | None = None,
    jobs: int = 1,
) -> None:
    """Compare the weight files of an output with what they were made from, in blocks, by `jobs` threads.

    Computed values are computed again in float64 and may differ by one unit in the last place of the output's dtype
    (and by what sums in float32 lose, where sums are made so); copied ones must be equal. A sample is one tile of some
    tensors, the same at every run.

    Args:
        full: every value; and every safetensors file is read with the safetensors library too.
        digests: of computed tensors as they were written; compared with what is read where `full`.

    Raises: MergeError (LF801): something differs; ContainerError: a file cannot be read.
    """
    checks = _checks(plan, inputs, output, full=full, digests=digests or {})
    with one_thread_each() if _needs_torch(plan, inputs, full=full) else nullcontext():
        for _ in open_engine(jobs).map(lambda task: task(), checks):
            pass


def _needs_torch(plan: MergePlan, inputs: Inputs, *, full: bool) -> bool:
    """Whether a task may ask for torch, which is then imported before there are threads."""
    reads_with_library = full and any(shard.container == "safetensors" for shard in plan.shards)
    return (
        reads_with_library
        or copies_views(inputs)
        or any(not is_plain(edit, inputs) or reads_with_torch(edit, inputs) for edit in plan.edits)
    )


def _checks(
    plan: MergePlan, inputs: Inputs, output: LocalStore, *, full: bool, digests: Mapping[str, str]
) -> Iterator[_Task]:
    in_all = sum(len(shard.tensors) for shard in plan.shards)
    for shard in plan.shards:
        _, tensors = open_weights(output, [shard.target])
        _check_header(shard, tensors)
        if full and shard.container == "safetensors":
            yield lambda shard=shard, tensors=tensors: check_with_library(output, shard, tensors)  # type: ignore[misc]
        edits = {edit.tensor: edit for edit in shard.edits}
        for name in _chosen(sorted(edits), len(plan.edits), full):
            if full and name in digests:
                yield _hash_check(output, tensors[name], digests[name], name)
            yield from _edit_checks(edits[name], plan, inputs, output, tensors[name], full=full)
        copied = [tensor.name for tensor in shard.tensors if tensor.name not in edits]
        for name in _chosen(copied, in_all, full):
            yield from _copy_checks(name, inputs, output, tensors[name], full=full)


def _chosen(names: Sequence[str], in_all: int, full: bool) -> Sequence[str]:
    return names if full else names[:: max(1, in_all // _SAMPLES)]


def _check_header(shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    found = {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    wanted |= {alias: wanted[name] for alias, name in shard.aliases.items()}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise MergeError(f"{name}: found {found.get(name)}, planned {wanted.get(name)}", where=shard.target)


def _hash_check(output: LocalStore, stored: StoredTensor, digest: str, name: str) -> _Task:
    def check() -> None:
        if stored.strides is None and digest_of_range(output, stored.file, *stored.span) != digest:
            raise MergeError(
                f"{name}: the bytes in the file are not those that were written",
                where=stored.file,
                hint="the disk or the memory of this machine may be faulty",
            )

    return check


def _edit_checks(
    edit: Edit, plan: MergePlan, inputs: Inputs, output: LocalStore, stored: StoredTensor, *, full: bool
) -> Iterator[_Task]:
    steps, unit = Steps(edit, inputs, DType.F64), unit_of(edit, inputs)
    accumulate = plan.arithmetic.accumulate

    def check(start: int, stop: int) -> None:
        for low, high in blocks_of(start, stop, _PLAIN_ROWS if steps.is_plain else unit):
            compare_rows(edit, steps, inputs, output, stored, (low, high), accumulate)

    for start, stop in windows(edit, inputs, Limits()) if full else _one_tile(edit, unit):
        yield lambda start=start, stop=stop: check(start, stop)  # type: ignore[misc]


def _one_tile(edit: Edit, unit: int) -> Iterator[tuple[int, int]]:
    """The tile that the tensor's name picks; none where it has no rows."""
    rows = edit.matrix[0]
    tiles = -(-rows // unit)
    if tiles:
        start = int.from_bytes(hashlib.sha256(edit.tensor.encode()).digest()[:8], "little") % tiles * unit
        yield start, min(start + unit, rows)


def _copy_checks(name: str, inputs: Inputs, output: LocalStore, stored: StoredTensor, *, full: bool) -> Iterator[_Task]:
    source = inputs.base.tensors[name]
    if source.strides is not None or stored.strides is not None:
        yield lambda: _compare_views(name, inputs, output, stored, full=full)
        return
    nbytes = stored.span.nbytes if full else min(stored.span.nbytes, _BLOCK_NBYTES)
    for start, stop in blocks_of(0, nbytes, _TASK_NBYTES):
        yield lambda start=start, stop=stop: _compare_bytes(name, inputs, output, stored, start, stop)  # type: ignore[misc]


def _compare_bytes(name: str, inputs: Inputs, output: LocalStore, stored: StoredTensor, start: int, stop: int) -> None:
    source = inputs.base.tensors[name]
    for low, high in blocks_of(start, stop, _BLOCK_NBYTES):
        before = inputs.store.read(source.file, source.span.offset + low, high - low)
        if output.read(stored.file, stored.span.offset + low, high - low) != before:
            raise _differs(name, stored)


def _compare_views(name: str, inputs: Inputs, output: LocalStore, stored: StoredTensor, *, full: bool) -> None:
    """Rows of a tensor that is not stored in the order of its elements in one of the files."""
    import torch

    source = inputs.base.tensors[name]
    rows = source.shape[0] if source.shape else 1
    step = max(1, _BLOCK_NBYTES // max(1, columns_of(source.shape) * source.dtype.itemsize))
    for start, stop in blocks_of(0, rows if full else min(rows, step), step):
        before, after = inputs.base.weights[name].read(start, stop), read_rows(output, stored, start, stop)
        if not torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)):
            raise _differs(name, stored)


def _differs(name: str, stored: StoredTensor) -> MergeError:
    return MergeError(f"{name}: the copy differs from the base", where=stored.file)
