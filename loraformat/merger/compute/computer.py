"""Windows of edited tensors computed and rounded: read, added to, measured, ready to be written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

from loraformat.arithmetic import Tally, takes
from loraformat.arithmetic import window as add_product
from loraformat.engine import one_thread_each
from loraformat.errors import NonFiniteValue
from loraformat.merger.compute.apply import apply, blocks_of
from loraformat.merger.compute.buffers import Block, Buffers
from loraformat.merger.compute.cuda import Accelerator
from loraformat.merger.compute.kinds.steps import Addition, Overwrite, Product, Step
from loraformat.merger.compute.low_rank import reads_with_torch
from loraformat.merger.compute.prepared import Steps, compute_dtype
from loraformat.merger.compute.retention import change_of, tally_of
from loraformat.merger.compute.rounding import keep_unchanged, rounder
from loraformat.merger.compute.windows import Resources, read_window, strip_of, unit_of
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Computed:
    """The bytes of rows of an edited tensor as they are written, and their tallies; None where rows are replaced."""

    data: memoryview
    tally: tuple[Tally, ...] | None


class Computer:
    """Computes windows of edits, in memory that each thread keeps."""

    def __init__(self, inputs: Inputs, arithmetic: Arithmetic, limits: Resources) -> None:
        device = limits.device
        self._inputs, self._arithmetic = inputs, arithmetic
        self._turns = BoundedSemaphore(limits.jobs)
        self._buffers = Buffers(is_pinned=device is not None and device.type == "cuda")
        self._accelerator = None if device is None else Accelerator(device)

    def window(self, edit: Edit, steps: Steps, start: int, stop: int, phase: int = 0) -> Computed:
        """Rows `start:stop` of an edit; valid until this thread asks for the next.

        Args:
            phase: how many bytes into a page of its file the rows will stand.

        Raises: NonFiniteValue (LF402): a value is NaN or infinite that was finite in the base.
        """
        raw = self._read(edit, start, stop)
        written = self._buffers.block("written", stop - start, edit.matrix[1], DType[edit.dtype], phase)
        with self._turns:
            tallies = self._computed(edit, steps, raw, start, written)
        return Computed(written.data, None if tallies is None else tuple(tallies))

    def _computed(self, edit: Edit, steps: Steps, raw: Block, start: int, written: Block) -> list[Tally] | None:
        """Fill `written`, rows from `start` on; their tallies, None where rows are replaced."""
        tallies: list[Tally] | None
        accelerator = self._accelerator
        if self._is_one_product(edit, steps):
            stop = start + written.rows
            tallies = add_product(steps.packed(), start, stop, raw.data, raw.dtype, written.data, written.dtype)
        elif accelerator is not None and self._is_nearest and (products := plain_products(steps.get()[0])):
            tallies = [accelerator.add(raw.tensor(), products, start, written.tensor(), steps.dtype.torch)]
        else:
            tallies = self._rounded(edit, steps, raw.tensor(), start, written.tensor())
        # A value that is not finite makes the sum of its tile so; without sums every value is looked at.
        if tallies is None or not all(math.isfinite(tally.kept) for tally in tallies):
            _refuse_non_finite(edit, raw.tensor(), written.tensor(), start)
        return tallies

    def alone(self, edits: Iterable[Edit]) -> AbstractContextManager[None]:
        """`one_thread_each`, which imports torch, where any of the edits or a copy needs it."""
        inputs = self._inputs
        needs_torch = (
            not self._is_one_product(edit, self.steps(edit)) or reads_with_torch(edit, inputs) for edit in edits
        )
        return one_thread_each() if inputs.has_views or any(needs_torch) else nullcontext()

    def steps(self, edit: Edit) -> Steps:
        """The steps of an edit, none of them made ready."""
        return Steps(edit, self._inputs, compute_dtype(edit, self._inputs, self._arithmetic.accumulate))

    @property
    def _is_nearest(self) -> bool:
        return self._arithmetic.rounding == "nearest"

    def _is_one_product(self, edit: Edit, steps: Steps) -> bool:
        """Whether an edit is computed in one pass, without torch."""
        if self._accelerator is not None or not (self._is_nearest and steps.is_plain and steps.dtype is DType.F64):
            return False
        return takes(self._inputs.base.tensors[edit.source].dtype, DType[edit.dtype])

    def _rounded(self, edit: Edit, steps: Steps, raw: Tensor, start: int, values: Tensor) -> list[Tally] | None:
        """Fill `values`, rows from `start` on, strip by strip; the tallies of each, None where rows are replaced."""
        ready, norms = steps.get()
        round_into = rounder(self._arithmetic, edit.tensor)
        is_change = bool(ready) and not any(isinstance(step, Overwrite) for step in ready)
        tallies: list[Tally] | None = [] if is_change else None
        cols = edit.matrix[1]
        height = strip_of(cols, steps.dtype.itemsize) if plain_products(ready) else unit_of(edit, self._inputs)
        for low, high in blocks_of(start, start + values.shape[0], height):
            base, update, result = self._tile(raw[low - start : high - start], ready, norms, low, steps.dtype.torch)
            written = values[low - start : high - start]
            round_into(written, result, low * cols)
            if tallies is not None:
                keep_unchanged(written, raw[low - start : high - start], base, update)
                tallies.append(tally_of(change_of(written, base, result), update))
        return tallies

    def _read(self, edit: Edit, start: int, stop: int) -> Block:
        """Rows of the base tensor as stored; rows that it lacks are zero."""
        weight = self._inputs.base.weights[edit.source].as_matrix(edit.row_axes)
        block = self._buffers.block("read", stop - start, edit.matrix[1], weight.dtype)
        if weight.read_into is None:
            block.tensor().copy_(read_window(self._inputs, edit, start, stop, weight.dtype.torch))
            return block
        there = max(0, min(stop, weight.rows) - start)
        nbytes = there * block.cols * weight.dtype.itemsize
        if there:
            weight.read_into(start, start + there, block.data[:nbytes])
        block.data[nbytes:] = bytes(block.data.nbytes - nbytes)
        return block

    def _tile(
        self, raw: Tensor, steps: Sequence[Step], norms: Sequence[Tensor | None], low: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(W, D, W + D) of one tile; D is what the steps add, before rounding."""
        import torch

        rows, cols = raw.shape
        base, update, result = (self._buffers.matrix(name, rows, cols, dtype) for name in ("base", "update", "result"))
        base.copy_(raw)
        if products := plain_products(steps):
            for number, product in enumerate(products):
                left = product.left[low : low + rows]
                if number == 0:
                    torch.mm(left, product.right, out=update)
                else:
                    update.addmm_(left, product.right)
            torch.add(base, update, out=result)
        else:
            apply(result.copy_(base), low, steps, norms)
            torch.sub(result, base, out=update)
        return base, update, result


def plain_products(steps: Sequence[Step]) -> list[Product]:
    """The matrix products that steps add, where they do nothing else; they need no memory of their own then."""
    found = [
        step.delta
        for step in steps
        if isinstance(step, Addition)
        and step.magnitude is None
        and step.span is None
        and isinstance(step.delta, Product)
    ]
    return found if len(found) == len(steps) else []


def _refuse_non_finite(edit: Edit, raw: Tensor, values: Tensor, start: int) -> None:
    """Raise where a value is not finite that was finite in the base: overflow, or a norm of zero."""
    bad = (raw.isfinite() & ~values.isfinite()).nonzero()
    if len(bad):
        row, column = (int(number) for number in bad[0])
        raise NonFiniteValue(
            f"the merged value at row {start + row}, column {column} is not finite in {edit.dtype}",
            where=edit.tensor,
            hint="the update overflows float16" if edit.dtype == "F16" else "",
        )
