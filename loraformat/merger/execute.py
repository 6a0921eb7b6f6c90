"""A plan carried out: files copied, windows of rows computed and written in place, memory bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.containers import check_records, combine_crc32, plan_file, read_rows
from loraformat.containers.layout import Layout
from loraformat.engine import open_engine
from loraformat.errors import NonFiniteValue
from loraformat.merger.apply import TILE, Addition, Step, add_column_squares, apply, blocks_of, prepare
from loraformat.merger.copies import Done, Inputs, Target, Task, columns_of, tensor_copies, verbatim_copies
from loraformat.merger.multiply import common_unit, row_unit
from loraformat.merger.plan import Edit, ShardPlan
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tensors import DType, Entry
from loraformat.storage.base import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Bytes of memory for an element of a window: as read, in float32, the product's tile and sum, as written.
_NBYTES_PER_ELEMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of the machine a merge may take.

    Attributes:
        jobs: threads.
        memory_nbytes: for all windows together; Python, torch and the adapter's factors come on top.
        progress: called with bytes done since the last call.
    """

    jobs: int = 1
    memory_nbytes: int = 64 << 20
    progress: Callable[[int], None] | None = None


class _Steps:
    """The terms of one edit, made ready when the first window asks; freed with the last window of it."""

    def __init__(self, edit: Edit, inputs: Inputs, limits: Limits) -> None:
        self._edit, self._inputs, self._limits = edit, inputs, limits
        self._lock = Lock()
        self._ready: tuple[list[Step], list[Tensor | None]] | None = None

    def get(self) -> tuple[list[Step], list[Tensor | None]]:
        """(steps, column norms of each)."""
        with self._lock:
            if self._ready is None:
                self._ready = self._prepare()
            return self._ready

    def _prepare(self) -> tuple[list[Step], list[Tensor | None]]:
        edit, dtype = self._edit, compute_dtype(self._edit)
        steps = [
            prepare(
                self._inputs.update(term),
                term.transposed,
                (_rows_of(edit), columns_of(edit.shape)),
                dtype,
                term.weight,
            )
            for term in edit.terms
        ]
        return steps, [self._norms(step, steps) for step in steps]

    def _norms(self, step: Step, steps: Sequence[Step]) -> Tensor | None:
        import torch

        if not isinstance(step, Addition) or not step.needs_column_norms:
            return None
        edit = self._edit
        total = torch.zeros(1, columns_of(edit.shape), dtype=torch.float64)
        for start, stop in windows(edit, self._inputs, self._limits):
            block = read_window(self._inputs, edit, start, stop)
            add_column_squares(total, block, start, steps, step)
        return total.sqrt().to(compute_dtype(edit))


def compute_dtype(edit: Edit) -> torch.dtype:
    """The dtype in which an edit is computed: float64 for float64 tensors, else float32."""
    import torch

    return torch.float64 if edit.dtype == "F64" else torch.float32


def windows(edit: Edit, inputs: Inputs, limits: Limits) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows in which an edit is computed: whole tiles, as many as the memory allows.

    Where an update mixes rows, they are whole blocks of it as well; the largest block is the least window.
    """
    rows = _rows_of(edit)
    unit = common_unit([TILE, *(row_unit(inputs.update(term), term.transposed, rows) for term in edit.terms)], rows)
    budget = limits.memory_nbytes // (limits.jobs * _NBYTES_PER_ELEMENT * max(1, columns_of(edit.shape)))
    return blocks_of(0, rows, max(unit, budget // unit * unit))


def _rows_of(edit: Edit) -> int:
    return edit.shape[0] if edit.shape else 1


def read_window(inputs: Inputs, edit: Edit, start: int, stop: int) -> Tensor:
    """Rows of the base tensor of an edit in its compute dtype, (stop - start, cols); rows that it lacks are zero."""
    import torch

    stored = inputs.base.tensors[edit.source]
    there = min(stop, stored.shape[0] if stored.shape else 1)
    window = torch.zeros(stop - start, columns_of(edit.shape), dtype=compute_dtype(edit))
    if there > start:
        window[: there - start] = read_rows(inputs.store, stored, start, there).reshape(there - start, -1)
    return window


def write_shard(shard: ShardPlan, inputs: Inputs, output: Store, limits: Limits) -> None:
    """Write one output file.

    Raises:
        NonFiniteValue (LF402): an adapter value, or a result where the base was finite, is NaN or infinite.
        ContainerError: a record of a `.pt` base does not have its checksum.
        StorageError: a read or write failed.
    """
    file = inputs.base.files[shard.source]
    if file.container == "torch":
        check_records(inputs.store, file.name)
    layout = None if shard.verbatim else _layout(shard)
    entries = _verbatim_entries(shard, inputs.base) if layout is None else layout.entries
    size = file.nbytes if layout is None else layout.nbytes
    needs_checksums = layout is not None and layout.needs_checksums
    checksums = dict.fromkeys((tensor.name for tensor in shard.tensors), 0)
    with output.create(shard.target, size) as writer:
        target = Target(writer, entries, needs_checksums)
        for done in open_engine(limits.jobs).map(lambda task: task(), _tasks(shard, inputs, target, limits)):
            if needs_checksums:
                checksums[done.tensor] = combine_crc32(checksums[done.tensor], done.checksum, done.nbytes)
            if limits.progress is not None:
                limits.progress(done.nbytes)
        if layout is not None:
            for offset, data in layout.frame(checksums):
                writer.write_at(offset, data)


def _layout(shard: ShardPlan) -> Layout:
    return plan_file(
        shard.container,
        {tensor.name: (DType[tensor.dtype], tensor.shape) for tensor in shard.tensors},
        metadata=shard.metadata,
        wrapper=shard.wrapper,
        aliases=shard.aliases,
        name=shard.target.rpartition(".")[0] or "archive",
    )


def _verbatim_entries(shard: ShardPlan, base: Checkpoint) -> dict[str, Entry]:
    return {tensor.name: base.tensors[tensor.name].entry for tensor in shard.tensors}


def _tasks(shard: ShardPlan, inputs: Inputs, target: Target, limits: Limits) -> Iterator[Task]:
    """All pieces of work of a file; pieces of one tensor come in order of their rows."""
    edited = {edit.tensor for edit in shard.edits}
    if shard.verbatim:
        yield from verbatim_copies(inputs, inputs.base.files[shard.source], edited, target)
    else:
        for tensor in shard.tensors:
            if tensor.name not in edited:
                yield from tensor_copies(inputs, tensor.name, target)
    for edit in shard.edits:
        steps = _Steps(edit, inputs, limits)
        for start, stop in windows(edit, inputs, limits):
            yield _window_task(inputs, edit, steps, start, stop, target)


def _window_task(inputs: Inputs, edit: Edit, steps: _Steps, start: int, stop: int, target: Target) -> Task:
    def run() -> Done:
        window = read_window(inputs, edit, start, stop)
        ready, norms = steps.get()
        result = apply(window, start, ready, norms).to(DType[edit.dtype].torch)
        if not bool(result.isfinite().all()):
            _refuse_non_finite(inputs, edit, start, stop, result)
        return target.write(edit.tensor, result, start)

    return run


def _refuse_non_finite(inputs: Inputs, edit: Edit, start: int, stop: int, result: Tensor) -> None:
    """Raise where a value is not finite that was finite in the base: overflow, or a norm of zero."""
    before = read_window(inputs, edit, start, stop).isfinite()
    bad = (before & ~result.isfinite()).nonzero()
    if len(bad):
        row, column = (int(number) for number in bad[0])
        raise NonFiniteValue(
            f"the merged value at row {start + row}, column {column} is not finite in {edit.dtype}",
            where=edit.tensor,
            hint="the update overflows the dtype of the base" if edit.dtype == "F16" else "",
        )
