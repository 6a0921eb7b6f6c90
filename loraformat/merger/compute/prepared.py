"""The terms of an edit made ready to be computed: read when the first window asks, and once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.arithmetic import Packed, pack
from loraformat.merger.compute.apply import add_column_squares
from loraformat.merger.compute.combination import combination, sparsity_of
from loraformat.merger.compute.kinds.placement import BaseValues, Placement, Windows
from loraformat.merger.compute.kinds.steps import Addition, Step
from loraformat.merger.compute.low_rank import factors_of, is_plain
from loraformat.merger.compute.windows import Resources, read_window, rows_of, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit, Term
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Replace

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


class Steps:
    """The terms of one edit, made ready when the first window asks; freed with the last window of it."""

    def __init__(self, edit: Edit, inputs: Inputs, arithmetic: Arithmetic) -> None:
        self._sparsity = sparsity_of(edit, inputs, arithmetic)
        self.is_plain = self._sparsity is None and is_plain(edit, inputs)
        self._edit, self._inputs = edit, inputs
        self._lock = Lock()
        self._ready: tuple[list[Step], list[Floats | None]] | None = None
        self._packed: Packed | None = None
        self._factors: tuple[Floats, Floats] | None = None

    @property
    def copied(self) -> LazyTensor | None:
        """The tensor of an adapter whose bytes are those of the whole result; None where values are computed."""
        terms = self._edit.terms
        update = self._inputs.update(terms[0]) if len(terms) == 1 else None
        if not isinstance(update, Replace) or terms[0].transposed:
            return None
        is_same = update.value.dtype.safetensors == self._edit.dtype
        return update.value if is_same and update.value.raw is not None else None

    def get(self) -> tuple[list[Step], list[Floats | None]]:
        """(steps, column norms of each)."""
        with self._lock:
            if self._ready is None:
                self._ready = self._prepare()
            return self._ready

    def packed(self) -> Packed:
        """All terms of a plain edit as one product."""
        with self._lock:
            if self._packed is None:
                self._packed = pack(*factors_of(self._edit, self._inputs))
            return self._packed

    def factors(self) -> tuple[Floats, Floats]:
        """The factors of the same: (rows, rank) and (rank, cols)."""
        with self._lock:
            if self._factors is None:
                self._factors = factors_of(self._edit, self._inputs)
            return self._factors

    def _prepare(self) -> tuple[list[Step], list[Floats | None]]:
        if self._sparsity is not None:
            combined = combination(self._edit, self._sparsity, self._step)
            return list(combined), [None for _ in combined]
        steps = [self._step(term) for term in self._edit.terms]
        return steps, [self._norms(step, steps) for step in steps]

    def _step(self, term: Term) -> Step:
        """A term made ready; one that depends on the base is computed from all of the base's matrix first."""
        from loraformat.merger.compute.kinds.arithmetic import prepare

        edit, operand = self._edit, term.operand

        def of_operand() -> tuple[Windows, bool]:
            assert operand is not None
            return rows_of(self._inputs, operand.tensor), operand.transposed

        def whole() -> Floats:
            return read_window(self._inputs, edit, 0, edit.matrix[0])

        base = BaseValues(whole, self._base_windows, of_operand)
        place = Placement(term.transposed, edit.matrix, term.weight, term.part, term.strength, lambda: base)
        return prepare(self._inputs.update(term), place)

    def _base_windows(self) -> Iterator[tuple[int, Floats]]:
        for start, stop in windows(self._edit, self._inputs, Resources()):
            yield start, read_window(self._inputs, self._edit, start, stop)

    def _norms(self, step: Step, steps: Sequence[Step]) -> Floats | None:
        """The lengths of the columns for a DoRA step that has one magnitude for each, in one pass over the base."""
        import numpy as np

        if not isinstance(step, Addition) or not step.needs_column_norms:
            return None
        total = np.zeros((1, self._edit.matrix[1]))
        for start, block in self._base_windows():
            add_column_squares(total, block, start, steps, step)
        return np.sqrt(total)
