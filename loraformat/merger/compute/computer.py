"""Windows of edited tensors computed and rounded: read, added to, measured, ready to be written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

from loraformat.arithmetic import Tally, convert, finish, product, takes, window
from loraformat.errors import NonFiniteValue
from loraformat.merger.compute.apply import apply, blocks_of, strip_of
from loraformat.merger.compute.buffers import Block, Buffers
from loraformat.merger.compute.kinds.steps import Overwrite, not_finite
from loraformat.merger.compute.prepared import Steps
from loraformat.merger.compute.retention import tally_of
from loraformat.merger.compute.rounding import Chance, keep_unchanged, nearest_bits, values_of
from loraformat.merger.compute.windows import Resources
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit
from loraformat.model.tensors import DType, LazyTensor, bytes_of

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# The bits that are all set in infinity and NaN, and in nothing else.
_EXPONENTS = {DType.BF16: 0x7F80, DType.F16: 0x7C00, DType.F32: 0x7F80_0000, DType.F64: 0x7FF0_0000_0000_0000}


@dataclass(frozen=True, slots=True)
class Computed:
    """The bytes of rows of an edited tensor as they are written, and their tallies; None where rows are replaced."""

    data: memoryview
    tally: tuple[Tally, ...] | None


class Computer:
    """Computes windows of edits, in memory that each thread keeps."""

    def __init__(self, inputs: Inputs, arithmetic: Arithmetic, limits: Resources) -> None:
        self._inputs, self._arithmetic = inputs, arithmetic
        self._turns = BoundedSemaphore(limits.jobs)
        self._buffers, self._accelerator = Buffers(), None
        if limits.device is not None:
            from loraformat.merger.compute.cuda import Accelerator, pinned_memory

            self._accelerator = Accelerator(limits.device)
            if limits.device.type == "cuda":
                self._buffers = Buffers(pinned_memory)

    def window(self, edit: Edit, steps: Steps, start: int, stop: int, phase: int = 0) -> Computed:
        """Rows `start:stop` of an edit; valid until this thread asks for the next.

        Args:
            phase: how many bytes into a page of its file the rows will stand.

        Raises: NonFiniteValue (LF402): a value is NaN or infinite that was finite in the base.
        """
        written = self._buffers.block("written", stop - start, edit.matrix[1], DType[edit.dtype], phase)
        copied = steps.copied
        if copied is not None:
            _copy_rows(copied, start, written, edit.terms[0].weight)
            return Computed(written.data, None)
        if self._is_rounded_only(edit, written.dtype) and self._round(edit, start, stop, written.data):
            return Computed(written.data, None)
        raw = self._read(edit, start, stop)
        with self._turns:
            tallies = self._computed(edit, steps, raw, start, written)
        # A value that is not finite makes the sum of its tile so; without sums every value is looked at.
        if tallies is None or not all(math.isfinite(tally.kept) for tally in tallies):
            _refuse_non_finite(edit, raw, written, start)
        return Computed(written.data, tuple(tallies) if tallies and edit.terms else None)

    def exact(self, edit: Edit, steps: Steps, start: int, stop: int) -> tuple[Floats, Floats]:
        """(values of the base, result before any rounding) of rows `start:stop` of an edit, (stop - start, columns)."""
        import numpy as np

        raw = self._read(edit, start, stop)
        base, exact = (np.empty((raw.rows, raw.cols)) for _ in range(2))
        with self._turns:
            ready = [] if steps.is_plain else steps.get()[0]
            for low, high in blocks_of(0, raw.rows, strip_of(raw.cols, edit.matrix[0], ready)):
                base[low:high], _, exact[low:high] = self._strip(edit, steps, raw.part(low, high), start + low)
        return base, exact

    def steps(self, edit: Edit) -> Steps:
        """The steps of an edit, none of them made ready."""
        return Steps(edit, self._inputs, self._arithmetic)

    def _is_rounded_only(self, edit: Edit, dtype: DType) -> bool:
        return not edit.terms and self._is_nearest and dtype in (DType.BF16, DType.F16)

    def _round(self, edit: Edit, start: int, stop: int, written: memoryview) -> bool:
        """Whether a base weight could round its rows itself, with only finite numbers."""
        weight = self._inputs.base.weights[edit.source].as_matrix(edit.row_axes)
        if weight.round_into is None or stop > weight.rows:
            return False
        return weight.round_into(start, stop, written, DType[edit.dtype])

    @property
    def _is_nearest(self) -> bool:
        return self._arithmetic.rounding == "nearest"

    def _computed(self, edit: Edit, steps: Steps, raw: Block, start: int, written: Block) -> list[Tally] | None:
        """Fill `written`, rows from `start` on; their tallies, None where rows are replaced."""
        if not edit.terms and self._is_nearest and raw.dtype is not written.dtype and takes(raw.dtype, written.dtype):
            is_finite = convert(raw.data, raw.dtype, written.data, written.dtype)
            return [] if is_finite else None
        if not (steps.is_plain and self._is_nearest):
            return self._rounded(edit, steps, raw, start, written)
        if self._accelerator is not None:
            return [self._accelerator.add(raw, steps.factors(), start, written)]
        if takes(raw.dtype, written.dtype):
            stop = start + raw.rows
            return window(steps.packed(), start, stop, raw.data, raw.dtype, written.data, written.dtype)
        return self._rounded(edit, steps, raw, start, written)

    def _rounded(self, edit: Edit, steps: Steps, raw: Block, start: int, written: Block) -> list[Tally] | None:
        """Fill `written`, rows from `start` on, strip by strip; the tallies of each, None where rows are replaced."""
        ready = [] if steps.is_plain else steps.get()[0]
        is_change = not any(isinstance(step, Overwrite) for step in ready)
        chance = None if self._is_nearest else Chance(self._arithmetic.seed, edit.tensor)
        tallies: list[Tally] = []
        for low, high in blocks_of(0, raw.rows, strip_of(raw.cols, edit.matrix[0], ready)):
            before, after = raw.part(low, high), written.part(low, high)
            base, update, result = self._strip(edit, steps, before, start + low)
            if is_change and chance is None:
                tallies += finish(before.data, before.dtype, result, update, after.data, after.dtype)
            elif chance is None:
                after.bits[:] = nearest_bits(result, after.dtype)
            else:
                after.bits[:] = chance.bits(result, after.dtype, (start + low) * raw.cols)
                if is_change:
                    keep_unchanged(before, after, base, update)
                    tallies.append(tally_of(base, values_of(after.bits, after.dtype), update))
        return tallies if is_change else None

    def _read(self, edit: Edit, start: int, stop: int) -> Block:
        """Rows of the base tensor as stored; rows that it lacks are zero."""
        weight = self._inputs.base.weights[edit.source].as_matrix(edit.row_axes)
        if self._inputs.base.tensors[edit.source].encoded and stop <= weight.rows:
            # In memory of its own already, which is worth no copy.
            values = bytes_of(weight.read(start, stop), weight.dtype)
            return Block(values, weight.dtype, stop - start, edit.matrix[1])
        block = self._buffers.block("read", stop - start, edit.matrix[1], weight.dtype)
        there = max(0, min(stop, weight.rows) - start)
        nbytes = there * block.cols * weight.dtype.itemsize
        if there and weight.read_into is not None:
            weight.read_into(start, start + there, block.data[:nbytes])
        elif there:
            block.data[:nbytes] = bytes_of(weight.read(start, start + there), weight.dtype)
        block.data[nbytes:] = bytes(block.data.nbytes - nbytes)
        return block

    def _strip(self, edit: Edit, steps: Steps, raw: Block, low: int) -> tuple[Floats, Floats, Floats]:
        """(W, D, W + D) of a strip that begins at row `low`; D is what the steps add, before rounding.

        Where nothing is added D is W: it is rounded to another dtype, and an overflow shows in the tally.
        """
        import numpy as np

        base, update, result = (self._buffers.matrix(name, raw.rows, raw.cols) for name in ("base", "update", "result"))
        with np.errstate(all="ignore"):
            base[:] = raw.numbers
            if not edit.terms:
                return base, base, base
            if steps.is_plain:
                update = product(steps.packed(), low, low + raw.rows)
                np.add(base, update, out=result)
            else:
                result[:] = base
                np.subtract(apply(result, low, *steps.get()), base, out=update)
        return base, update, result


def _copy_rows(tensor: LazyTensor, start: int, written: Block, where: str) -> None:
    """Fill `written` with the bytes of rows of an adapter's tensor from `start` on.

    Raises: NonFiniteValue (LF402): a value is NaN or infinite.
    """
    assert tensor.raw is not None
    written.data[:] = tensor.raw(start, start + written.rows)
    exponent = written.bits.dtype.type(_EXPONENTS[written.dtype])
    for low, high in blocks_of(0, written.rows, strip_of(written.cols, written.rows)):
        if ((written.bits[low:high] & exponent) == exponent).any():
            raise not_finite(where)


def _refuse_non_finite(edit: Edit, raw: Block, written: Block, start: int) -> None:
    """Raise where a value is not finite that was finite in the base: overflow, or a norm of zero."""
    import numpy as np

    bad = np.argwhere(np.isfinite(raw.numbers) & ~np.isfinite(written.numbers))
    if len(bad):
        row, column = (int(number) for number in bad[0])
        raise NonFiniteValue(
            f"the merged value at row {start + row}, column {column} is not finite in {edit.dtype}",
            where=edit.tensor,
            hint="the update overflows float16" if edit.dtype == "F16" else "",
        )
