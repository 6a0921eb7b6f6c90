"""The output read back before it gets its name, and compared with the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from loraformat.containers import open_weights, read_rows
from loraformat.engine import one_thread_each, open_engine
from loraformat.errors import MergeError
from loraformat.merger.apply import apply, blocks_of
from loraformat.merger.copies import Inputs, as_matrix, columns_of
from loraformat.merger.independent import check_with_library
from loraformat.merger.plan import Edit, MergePlan, ShardPlan
from loraformat.merger.windows import Limits, Steps, compute_dtype, read_window, unit_of, windows
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType
from loraformat.storage.local import LocalStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SAMPLES = 32
_BLOCK_NBYTES = 4 << 20


def check_output(plan: MergePlan, inputs: Inputs, output: LocalStore, *, full: bool, jobs: int = 1) -> None:
    """Compare the weight files of an output with what they were made from.

    Computed values are computed again in float64 and may differ by one unit in the last place of the output's dtype
    (and by what sums in float32 lose, where sums are made so); copied ones must be equal. A sample is one tile of some
    tensors, the same at every run.

    Args:
        full: every value; and every safetensors file is read with the safetensors library too.
        jobs: threads.

    Raises: MergeError (LF801): something differs; ContainerError: a file cannot be read.
    """
    checks = _checks(plan, inputs, output, full)
    with one_thread_each(), closing(open_engine(jobs).map(lambda check: check(), checks)) as results:
        for _ in results:
            pass


def _checks(plan: MergePlan, inputs: Inputs, output: LocalStore, full: bool) -> Iterator[Callable[[], None]]:
    """Comparisons that may run side by side; headers are compared on the way."""
    planned = sum(len(shard.tensors) for shard in plan.shards)
    for shard in plan.shards:
        _, tensors = open_weights(output, [shard.target])
        _check_header(shard, tensors)
        if full and shard.container == "safetensors":
            yield partial(check_with_library, output.folder, shard, tensors)
        edits = {edit.tensor: edit for edit in shard.edits}
        for name in _chosen(sorted(edits), len(plan.edits), full):
            check = _EditCheck(edits[name], plan, inputs, output, tensors[name])
            for start, stop in _blocks(edits[name], inputs, full):
                yield partial(check.run, start, stop)
        copied = [tensor.name for tensor in shard.tensors if tensor.name not in edits]
        for name in _chosen(copied, planned, full):
            yield partial(_check_copy, name, inputs, output, tensors[name], full=full)


def _chosen(names: Sequence[str], in_all: int, full: bool) -> Sequence[str]:
    return names if full else names[:: max(1, in_all // _SAMPLES)]


def _check_header(shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    found = {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    wanted |= {alias: wanted[name] for alias, name in shard.aliases.items()}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise MergeError(f"{name}: found {found.get(name)}, planned {wanted.get(name)}", where=shard.target)


class _EditCheck:
    """Computes rows of an edited tensor again, from the base and the adapters."""

    def __init__(self, edit: Edit, plan: MergePlan, inputs: Inputs, output: LocalStore, stored: StoredTensor) -> None:
        import torch

        self._edit, self._inputs, self._output = edit, inputs, output
        self._stored = as_matrix(stored, edit.row_axes)
        self._accumulated = compute_dtype(edit, inputs, plan.arithmetic.accumulate)
        self._steps = Steps(edit, inputs, torch.float64)
        self._unit = unit_of(edit, inputs)

    def run(self, start: int, stop: int) -> None:
        """Compare rows `start:stop`, a few at a time."""
        for low, high in blocks_of(start, stop, self._unit):
            self._compare(low, high)

    def _compare(self, start: int, stop: int) -> None:
        import torch

        base = read_window(self._inputs, self._edit, start, stop, torch.float64)
        exact = apply(base.clone(), start, *self._steps.get())
        written = read_rows(self._output, self._stored, start, stop).reshape(exact.shape)
        # Nearly always every value is the exact one rounded; only where not is it worth asking how far they are apart.
        if torch.equal(written, exact.to(written.dtype)) and bool(written.isfinite().all()):
            return
        found = written.to(torch.float64)
        room = _room(base, exact, found, DType[self._edit.dtype].torch, self._accumulated)
        bad = (((found - exact).abs() > room) | ~found.isfinite() & base.isfinite()).nonzero()
        if len(bad):
            row, column = (int(number) for number in bad[0])
            raise MergeError(
                f"{self._edit.tensor}: row {start + row}, column {column} is {float(found[row, column])!r} "
                f"in the file, computed again it is {float(exact[row, column])!r}",
                where=self._stored.file,
                hint="the disk or the memory of this machine may be faulty",
            )


def _blocks(edit: Edit, inputs: Inputs, full: bool) -> Iterator[tuple[int, int]]:
    """All windows, or the tile that the tensor's name picks."""
    if full:
        yield from windows(edit, inputs, Limits())
        return
    rows = edit.matrix[0]
    unit = unit_of(edit, inputs)
    tiles = -(-rows // unit)
    if tiles:
        start = int.from_bytes(hashlib.sha256(edit.tensor.encode()).digest()[:8], "little") % tiles * unit
        yield start, min(start + unit, rows)


def _room(base: Tensor, exact: Tensor, found: Tensor, dtype: torch.dtype, accumulated: torch.dtype) -> Tensor:
    """How far a value may be from the exact one: a unit in the last place, and what the sums before lose."""
    import torch

    info = torch.finfo(dtype)
    _, exponent = torch.frexp(torch.maximum(exact.abs(), found.abs()).clamp(min=info.smallest_normal))
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    # Products of a few hundred terms, against the largest value of their row.
    lost = 2.0**-16 if accumulated == torch.float32 else 2.0**-44
    largest = (base.abs() + (exact - base).abs()).nan_to_num(0.0, 0.0, 0.0)
    return unit + lost * largest.amax(dim=1, keepdim=True) if exact.numel() else unit


def _check_copy(name: str, inputs: Inputs, output: LocalStore, stored: StoredTensor, *, full: bool) -> None:
    import torch

    source = inputs.base.tensors[name]
    rows = source.shape[0] if source.shape else 1
    row_nbytes = max(1, columns_of(source.shape) * source.dtype.itemsize)
    step = max(1, _BLOCK_NBYTES // row_nbytes)
    for start in range(0, rows if full else min(rows, step), step):
        stop = min(start + step, rows)
        before, after = (read_rows(s, t, start, stop) for s, t in ((inputs.store, source), (output, stored)))
        if not torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8)):
            raise MergeError(f"{name}: the copy differs from the base", where=stored.file)
