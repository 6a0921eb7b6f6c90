"""The result of a merge, one tensor after the other in windows of rows, without writing it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic import Tally, takes, window
from loraformat.matching import RowMap
from loraformat.merger.compute.apply import apply
from loraformat.merger.compute.kinds.steps import Addition
from loraformat.merger.compute.prepared import Steps
from loraformat.merger.compute.windows import Resources, read_window, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit, Term
from loraformat.merger.plan.edits import edits_of
from loraformat.merger.plan.layer_replication import as_written
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank, Update

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


@dataclass(frozen=True, slots=True)
class Survey:
    """Rows of the base as they are stored, and what would be kept of what is added to them.

    Attributes:
        raw: row-major, of `dtype`.
        tallies: for each dtype that was asked for, those of tiles of TILE rows.
    """

    raw: memoryview
    dtype: DType
    tallies: tuple[list[Tally], ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """A tensor of the base that an adapter changes, as a matrix of rows.

    Attributes:
        spans: (weight, first row, row after the last) of the rows that each weight is made of.
        updates: all that is done to it.
    """

    spans: tuple[tuple[str, int, int], ...]
    updates: tuple[Update, ...]
    _edit: Edit
    _inputs: Inputs

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, cols) after the merge."""
        return self._edit.matrix

    @property
    def is_table(self) -> bool:
        """Whether it is stored as a matrix, as tables of embeddings are."""
        return len(self._edit.shape) == 2

    @property
    def rows_stored(self) -> int:
        """Rows that the base has; an update may add some."""
        stored = self._inputs.base.tensors[self._edit.source].shape
        return math.prod(stored[: self._edit.row_axes]) if stored else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in the base."""
        return self.matrix[1] * self._inputs.base.tensors[self._edit.source].dtype.itemsize

    @property
    def is_product(self) -> bool:
        """Whether products of low-rank factors are added and nothing else, so that `Opened.product` tells what."""
        return all(isinstance(update, LowRank) and update.magnitude is None for update in self.updates)

    def windows(self, limits: Resources) -> list[tuple[int, int]]:
        """(first row, row after the last) of the windows in which it is read."""
        return list(windows(self._edit, self._inputs, limits))

    def open(self) -> Opened:
        """The tensor, to be computed: its factors are read when they are first needed and kept."""
        return Opened(Steps(self._edit, self._inputs, Arithmetic()), self._edit, self._inputs)


@dataclass(frozen=True, slots=True)
class Opened:
    """A tensor with the factors of what is done to it; threads may share it."""

    _steps: Steps
    _edit: Edit
    _inputs: Inputs

    def base(self, start: int, stop: int) -> Floats:
        """(rows, cols) of the base; zeros for rows that it does not have."""
        return read_window(self._inputs, self._edit, start, stop)

    def merged(self, base: Floats, start: int) -> Floats:
        """What becomes of rows of the base from `start` on, not rounded; `base` stays as it is."""
        steps, norms = self._steps.get()
        return apply(base.copy(), start, steps, norms)

    def survey(self, start: int, stop: int, dtypes: Sequence[DType]) -> Survey | None:
        """Rows as they are stored, and what each dtype would keep of a product that is added to all of them.

        None if they are not plain floats, or something else than such a product is added: `product` and `merged` say
        what, more slowly.

        Args:
            start: a multiple of TILE.
        """
        weight = self._inputs.base.weights[self._edit.source].as_matrix(self._edit.row_axes)
        is_plain = self._steps.is_plain and takes(weight.dtype, *dtypes)
        if weight.read_into is None or not is_plain or not start < stop <= weight.rows:
            return None
        numel = (stop - start) * self._edit.matrix[1]
        raw = memoryview(bytearray(numel * weight.dtype.itemsize))
        written = memoryview(bytearray(numel * max(dtype.itemsize for dtype in dtypes)))
        weight.read_into(start, stop, raw)
        packed = self._steps.packed()
        tallies = (
            window(packed, start, stop, raw, weight.dtype, written[: numel * dtype.itemsize], dtype) for dtype in dtypes
        )
        return Survey(raw, weight.dtype, tuple(tallies))

    def product(self, low: int, high: int) -> Floats:
        """What is added to rows `low:high` of a tensor that `is_product`; no row of a span's border is between them."""
        total: Floats | None = None
        for step in self._steps.get()[0]:
            assert isinstance(step, Addition)
            first, last = step.span or (0, high)
            if first <= low and high <= last:
                delta = step.delta(low - first, high - first)
                total = delta if total is None else total + delta
        assert total is not None
        return total


def previews_of(base: Checkpoint, adapter: Adapter) -> list[Preview]:
    """The tensors that an adapter changes; a table that is stored under two names is there once.

    Raises: MergeError, UnsupportedUpdate: a merge would not be made.
    """
    checkpoint = as_written(base, [adapter])
    inputs = Inputs(base=checkpoint, adapters=[adapter])
    found: list[Preview] = []
    taken: set[tuple[str, RowMap]] = set()
    for edit in edits_of(checkpoint, [adapter]).edits.values():
        spans = tuple(_spans(edit, taken))
        if spans:
            found.append(Preview(spans, tuple(inputs.update(term) for term in edit.terms), edit, inputs))
    return found


def _spans(edit: Edit, taken: set[tuple[str, RowMap]]) -> Iterator[tuple[str, int, int]]:
    """The rows of each weight whose part was not taken before."""
    seen: dict[tuple[str, RowMap], Term] = {}
    for term in edit.terms:
        seen.setdefault((term.weight, term.part), term)
    for key, term in seen.items():
        if key not in taken:
            taken.add(key)
            yield term.weight, term.part.at, term.part.at + height_of(edit, term.part)


def height_of(edit: Edit, part: RowMap) -> int:
    """Rows of the stored tensor that a part of an update goes to."""
    if part.rows is not None:
        return part.rows[1] - part.rows[0]
    is_slice = part.expert is not None and edit.row_axes > 1
    return edit.shape[1] if is_slice else edit.matrix[0]
