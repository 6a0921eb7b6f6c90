"""The output read back before it gets its name, and compared with the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loraformat.containers import open_weights, read_rows
from loraformat.errors import MergeError
from loraformat.merger.apply import apply
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


def check_output(plan: MergePlan, inputs: Inputs, output: LocalStore, *, full: bool) -> None:
    """Compare the weight files of an output with what they were made from.

    Computed values are computed again in float64 and may differ by one unit in the last place of the output's dtype
    (and by what sums in float32 lose, where sums are made so); copied ones must be equal. A sample is one tile of some
    tensors, the same at every run.

    Args:
        full: every value; and every safetensors file is read with the safetensors library too.

    Raises: MergeError (LF801): something differs; ContainerError: a file cannot be read.
    """
    for shard in plan.shards:
        _, tensors = open_weights(output, [shard.target])
        _check_header(shard, tensors)
        if full and shard.container == "safetensors":
            check_with_library(output.folder, shard, tensors)
        edits = {edit.tensor: edit for edit in shard.edits}
        for name in _chosen(sorted(edits), len(plan.edits), full):
            _check_edit(edits[name], plan, inputs, output, tensors[name], full=full)
        copied = [tensor.name for tensor in shard.tensors if tensor.name not in edits]
        for name in _chosen(copied, sum(len(one.tensors) for one in plan.shards), full):
            _check_copy(name, inputs, output, tensors[name], full=full)


def _chosen(names: Sequence[str], in_all: int, full: bool) -> Sequence[str]:
    return names if full else names[:: max(1, in_all // _SAMPLES)]


def _check_header(shard: ShardPlan, tensors: Mapping[str, StoredTensor]) -> None:
    found = {name: (tensor.dtype.safetensors, tensor.shape) for name, tensor in tensors.items()}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    wanted |= {alias: wanted[name] for alias, name in shard.aliases.items()}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise MergeError(f"{name}: found {found.get(name)}, planned {wanted.get(name)}", where=shard.target)


def _check_edit(
    edit: Edit, plan: MergePlan, inputs: Inputs, output: LocalStore, stored: StoredTensor, *, full: bool
) -> None:
    import torch

    accumulated = compute_dtype(edit, inputs, plan.arithmetic.accumulate)
    steps = Steps(edit, inputs, torch.float64)
    matrix = as_matrix(stored, edit.row_axes)
    for start, stop in _blocks(edit, inputs, full):
        base = read_window(inputs, edit, start, stop, torch.float64)
        ready, norms = steps.get()
        exact = apply(base.clone(), start, ready, norms)
        found = read_rows(output, matrix, start, stop).reshape(exact.shape).to(torch.float64)
        room = _room(base, exact, found, DType[edit.dtype].torch, accumulated)
        bad = (((found - exact).abs() > room) | ~found.isfinite() & base.isfinite()).nonzero()
        if len(bad):
            row, column = (int(number) for number in bad[0])
            raise MergeError(
                f"{edit.tensor}: row {start + row}, column {column} is {float(found[row, column])!r} in the file, "
                f"computed again it is {float(exact[row, column])!r}",
                where=stored.file,
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
