"""Windows of rows of one edited tensor: how large they are, how they are read, computed and rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING

from loraformat.containers import read_rows, read_rows_into
from loraformat.errors import NonFiniteValue
from loraformat.merger.accelerated import Accelerator
from loraformat.merger.apply import (
    TILE,
    Addition,
    Overwrite,
    Product,
    Step,
    add_column_squares,
    apply,
    blocks_of,
    prepare,
)
from loraformat.merger.buffers import Buffers
from loraformat.merger.copies import Inputs, as_matrix
from loraformat.merger.from_base import taken_off
from loraformat.merger.multiply import common_unit, row_unit
from loraformat.merger.plan import Arithmetic, Edit, Term
from loraformat.merger.retention import Tally, tally_of
from loraformat.merger.rounding import rounder
from loraformat.model.tensors import DType
from loraformat.model.updates import FromBase, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# A window is read into the cache of the processor, computed and written from there.
_MOST_WINDOW_NBYTES = 4 << 20
_TILES_IN_MEMORY = 3
# Three matrices of a strip are worked on at a time; larger ones leave the cache of a processor.
_MOST_STRIP_NBYTES = 3 << 19
_LEAST_STRIP = 16
# While so many threads wait for the disk, the others compute.
_WAITING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of the machine a merge may take.

    Attributes:
        jobs: threads that compute at a time; others read and write meanwhile.
        device: on which updates that are plain products are computed; None for the CPU, where all others are.
        memory_nbytes: for all windows together; Python, torch and the adapter's factors come on top.
        progress: called with bytes done since the last call.
    """

    jobs: int = 1
    device: torch.device | None = None
    memory_nbytes: int = 64 << 20
    progress: Callable[[int], None] | None = None

    @property
    def threads(self) -> int:
        """Threads in all."""
        return self.jobs + _WAITING


class Steps:
    """The terms of one edit, made ready when the first window asks; freed with the last window of it."""

    def __init__(self, edit: Edit, inputs: Inputs, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._edit, self._inputs = edit, inputs
        self._lock = Lock()
        self._ready: tuple[list[Step], list[Tensor | None]] | None = None

    def get(self) -> tuple[list[Step], list[Tensor | None]]:
        """(steps, column norms of each)."""
        with self._lock:
            if self._ready is None:
                self._ready = self._prepare()
            return self._ready

    def _prepare(self) -> tuple[list[Step], list[Tensor | None]]:
        edit = self._edit
        steps = [
            prepare(
                self._update(term),
                term.transposed,
                edit.matrix,
                self.dtype,
                term.weight,
                term.part,
                term.strength,
            )
            for term in edit.terms
        ]
        return steps, [self._norms(step, steps) for step in steps]

    def _update(self, term: Term) -> Update:
        """The update of a term; one that comes from the base is computed from all of the base's matrix."""
        update = self._inputs.update(term)
        if not isinstance(update, FromBase):
            return update
        stored = read_window(self._inputs, self._edit, 0, self._edit.matrix[0], self.dtype)
        return taken_off(update, stored, transposed=term.transposed, where=term.weight)

    def _norms(self, step: Step, steps: Sequence[Step]) -> Tensor | None:
        import torch

        if not isinstance(step, Addition) or not step.needs_column_norms:
            return None
        edit = self._edit
        total = torch.zeros(1, edit.matrix[1], dtype=torch.float64)
        for start, stop in windows(edit, self._inputs, Limits()):
            block = read_window(self._inputs, edit, start, stop, self.dtype)
            add_column_squares(total, block, start, steps, step)
        return total.sqrt().to(self.dtype)


def compute_dtype(edit: Edit, inputs: Inputs, accumulate: str) -> torch.dtype:
    """The dtype in which an edit is computed: float64 where asked for or where base or output is, else float32."""
    import torch

    wide = "F64" in (edit.dtype, inputs.base.tensors[edit.source].dtype.safetensors)
    return torch.float64 if wide or accumulate == "float64" else torch.float32


def unit_of(edit: Edit, inputs: Inputs) -> int:
    """Rows of an edit that are computed at a time: a tile, or whole blocks of an update that mixes rows."""
    rows = edit.matrix[0]
    return common_unit([TILE, *(row_unit(inputs.update(term), term.transposed, rows) for term in edit.terms)], rows)


def strip_of(cols: int, dtype: torch.dtype) -> int:
    """Rows of a plain product that are computed at a time: TILE, or a half or a quarter of it where rows are long."""
    height = TILE
    while height > _LEAST_STRIP and height * cols * dtype.itemsize > _MOST_STRIP_NBYTES:
        height //= 2
    return height


def windows(edit: Edit, inputs: Inputs, limits: Limits) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows in which an edit is computed: whole units, as many as the memory allows."""
    rows, cols = edit.matrix[0], max(1, edit.matrix[1])
    read, written = inputs.base.tensors[edit.source].dtype.itemsize, DType[edit.dtype].itemsize
    unit = unit_of(edit, inputs)
    tiles = _TILES_IN_MEMORY * unit * cols * 8
    budget = min(_MOST_WINDOW_NBYTES, (limits.memory_nbytes // limits.threads - tiles) * read // (read + written))
    return blocks_of(0, rows, max(unit, budget // (read * cols) // unit * unit))


def read_window(inputs: Inputs, edit: Edit, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows of the base tensor of an edit as `dtype`, (stop - start, cols); rows that it lacks are zero."""
    import torch

    stored = as_matrix(inputs.base.tensors[edit.source], edit.row_axes)
    there = min(stop, stored.shape[0] if stored.shape else 1)
    window = torch.zeros(stop - start, edit.matrix[1], dtype=dtype)
    if there > start:
        window[: there - start] = read_rows(inputs.store, stored, start, there).reshape(there - start, -1)
    return window


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows of an edited tensor as they are written, (rows, cols), and their tallies; None where rows are replaced."""

    values: Tensor
    tally: tuple[Tally, ...] | None


class Computer:
    """Computes windows of edits, in memory that each thread keeps."""

    def __init__(self, inputs: Inputs, arithmetic: Arithmetic, limits: Limits) -> None:
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
        values = self._buffers.matrix("written", stop - start, edit.matrix[1], DType[edit.dtype].torch, phase)
        with self._turns:
            tallies = self._computed(edit, steps, raw, start, values)
        return Computed(values, None if tallies is None else tuple(tallies))

    def _computed(self, edit: Edit, steps: Steps, raw: Tensor, start: int, values: Tensor) -> list[Tally] | None:
        """Fill `values`, rows from `start` on; their tallies, None where rows are replaced."""
        ready, _ = steps.get()
        products = plain_products(ready)
        tallies: list[Tally] | None
        if products and self._accelerator is not None and self._arithmetic.rounding == "nearest":
            tallies = [self._accelerator.add(raw, products, start, values, steps.dtype)]
        else:
            tallies = self._rounded(edit, steps, raw, start, values)
        # A value that is not finite makes the sum of its tile so; without sums every value is looked at.
        if tallies is None or not all(math.isfinite(tally.kept) for tally in tallies):
            _refuse_non_finite(edit, raw, values, start)
        return tallies

    def _rounded(self, edit: Edit, steps: Steps, raw: Tensor, start: int, values: Tensor) -> list[Tally] | None:
        """Fill `values`, rows from `start` on, strip by strip; the tallies of each, None where rows are replaced."""
        ready, norms = steps.get()
        round_into = rounder(self._arithmetic, edit.tensor)
        is_change = bool(ready) and not any(isinstance(step, Overwrite) for step in ready)
        tallies: list[Tally] | None = [] if is_change else None
        cols = edit.matrix[1]
        height = strip_of(cols, steps.dtype) if plain_products(ready) else unit_of(edit, self._inputs)
        for low, high in blocks_of(start, start + values.shape[0], height):
            base, update, result = self._tile(raw[low - start : high - start], ready, norms, low, steps.dtype)
            written = values[low - start : high - start]
            round_into(written, result, low * cols)
            if tallies is not None:
                result.copy_(written).sub_(base)
                tallies.append(tally_of(result, update))
        return tallies

    def _read(self, edit: Edit, start: int, stop: int) -> Tensor:
        """Rows of the base tensor as stored; rows that it lacks are zero."""
        stored = as_matrix(self._inputs.base.tensors[edit.source], edit.row_axes)
        cols = edit.matrix[1]
        if stored.strides is not None:
            return read_window(self._inputs, edit, start, stop, stored.dtype.torch)
        there = max(0, min(stop, stored.shape[0] if stored.shape else 1) - start)
        run = self._buffers.nbytes("read", (stop - start) * cols * stored.dtype.itemsize)
        nbytes = there * cols * stored.dtype.itemsize
        if there:
            read_rows_into(self._inputs.store, stored, start, start + there, memoryview(run[:nbytes].numpy()))
        run[nbytes:] = 0
        return run.view(stored.dtype.torch).view(stop - start, cols)

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
