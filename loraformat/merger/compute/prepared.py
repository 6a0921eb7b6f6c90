"""The terms of an edit made ready to be computed: read when the first window asks, and once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.arithmetic import Packed, pack
from loraformat.merger.compute.apply import add_column_squares
from loraformat.merger.compute.kinds.arithmetic import prepare
from loraformat.merger.compute.kinds.placement import BaseValues, Placement, Windows
from loraformat.merger.compute.kinds.steps import Addition, Step
from loraformat.merger.compute.low_rank import factors_of, is_plain
from loraformat.merger.compute.windows import Resources, read_window, rows_of, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit, Term
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from torch import Tensor

    from loraformat.model.floats import Floats


class Steps:
    """The terms of one edit, made ready when the first window asks; freed with the last window of it."""

    def __init__(self, edit: Edit, inputs: Inputs, dtype: DType) -> None:
        self.dtype = dtype
        self.is_plain = is_plain(edit, inputs)
        self._edit, self._inputs = edit, inputs
        self._lock = Lock()
        self._ready: tuple[list[Step], list[Tensor | None]] | None = None
        self._packed: Packed | None = None
        self._factors: tuple[Floats, Floats] | None = None

    def get(self) -> tuple[list[Step], list[Tensor | None]]:
        """(steps, column norms of each)."""
        with self._lock:
            if self._ready is None:
                self._ready = self._prepare()
            return self._ready

    def packed(self) -> Packed:
        """All terms of a plain edit as one product for the kernel."""
        with self._lock:
            if self._packed is None:
                self._packed = pack(*factors_of(self._edit, self._inputs))
            return self._packed

    def factors(self) -> tuple[Floats, Floats]:
        """All terms of a plain edit as one product: (rows, rank) and (rank, cols)."""
        with self._lock:
            if self._factors is None:
                self._factors = factors_of(self._edit, self._inputs)
            return self._factors

    def _prepare(self) -> tuple[list[Step], list[Tensor | None]]:
        steps = [self._step(term) for term in self._edit.terms]
        return steps, [self._norms(step, steps) for step in steps]

    def _step(self, term: Term) -> Step:
        """A term made ready; one that depends on the base is computed from all of the base's matrix first."""
        edit, operand = self._edit, term.operand

        def of_operand() -> tuple[Windows, bool]:
            assert operand is not None
            return rows_of(self._inputs, operand.tensor), operand.transposed

        def whole() -> Tensor:
            return read_window(self._inputs, edit, 0, edit.matrix[0], self.dtype.torch)

        base = BaseValues(whole, self._base_windows, of_operand)
        place = Placement(
            term.transposed, edit.matrix, self.dtype.torch, term.weight, term.part, term.strength, lambda: base
        )
        return prepare(self._inputs.update(term), place)

    def _base_windows(self) -> Iterator[tuple[int, Tensor]]:
        for start, stop in windows(self._edit, self._inputs, Resources()):
            yield start, read_window(self._inputs, self._edit, start, stop, self.dtype.torch)

    def _norms(self, step: Step, steps: Sequence[Step]) -> Tensor | None:
        import torch

        if not isinstance(step, Addition) or not step.needs_column_norms:
            return None
        edit = self._edit
        total = torch.zeros(1, edit.matrix[1], dtype=torch.float64)
        for start, block in self._base_windows():
            add_column_squares(total, block, start, steps, step)
        return total.sqrt().to(self.dtype.torch)


def compute_dtype(edit: Edit, inputs: Inputs, accumulate: str) -> DType:
    """The dtype in which an edit is computed: float64 where asked for or where base or output is, else float32."""
    wide = "F64" in (edit.dtype, inputs.base.tensors[edit.source].dtype.safetensors)
    return DType.F64 if wide or accumulate == "float64" else DType.F32
