"""Windows of rows of one edited tensor: how large they are, how they are read, computed and rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic import TILE
from loraformat.merger.compute.apply import blocks_of, common_unit
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit
from loraformat.model.tensors import DType
from loraformat.model.updates import kind_of

if TYPE_CHECKING:
    import torch

    from loraformat.model.floats import Floats

# A window is read into the cache of the processor, computed and written from there.
_MOST_WINDOW_NBYTES = 4 << 20
_TILES_IN_MEMORY = 3
# While so many threads wait for the disk, the others compute.
_WAITING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """How much of the machine a merge may take.

    Attributes:
        jobs: threads that compute at a time; others read and write meanwhile.
        device: on which updates that are plain products are computed; None for the CPU, where all others are.
        memory_nbytes: for all windows together; Python and the adapter's factors come on top.
        progress: called with bytes done since the last call.
    """

    jobs: int = 1
    device: torch.device | None = None
    memory_nbytes: int = 64 << 20
    progress: Callable[[int], None] | None = None

    @property
    def processor(self) -> str:
        """What computes: sums on another kind may differ in the last bit."""
        return "cpu" if self.device is None else str(self.device.type)

    @property
    def threads(self) -> int:
        """Threads in all."""
        return self.jobs + _WAITING


def unit_of(edit: Edit, inputs: Inputs) -> int:
    """Rows of an edit that are computed at a time: a tile, or whole blocks of an update that mixes rows."""
    rows = edit.matrix[0]
    units = [kind_of(update := inputs.update(term)).row_unit(update, term.transposed, rows) for term in edit.terms]
    return common_unit([TILE, *units], rows)


def windows(edit: Edit, inputs: Inputs, limits: Resources, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows in which an edit is computed: whole units, as many as the memory allows.

    Args:
        multiple: rows that no block may cut.
    """
    rows, cols = edit.matrix[0], max(1, edit.matrix[1])
    read, written = inputs.base.tensors[edit.source].dtype.itemsize, DType[edit.dtype].itemsize
    unit = common_unit([unit_of(edit, inputs), multiple], rows)
    tiles = _TILES_IN_MEMORY * unit * cols * 8
    budget = min(_MOST_WINDOW_NBYTES, (limits.memory_nbytes // limits.threads - tiles) * read // (read + written))
    return blocks_of(0, rows, max(unit, budget // (read * cols) // unit * unit))


def read_window(inputs: Inputs, edit: Edit, start: int, stop: int) -> Floats:
    """Rows of the base tensor of an edit, (stop - start, cols); rows that it lacks are zero."""
    import numpy as np

    weight = inputs.base.weights[edit.source].as_matrix(edit.row_axes)
    there = min(stop, weight.rows)
    window = np.zeros((stop - start, edit.matrix[1]))
    if there > start:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            window[: there - start] = weight.read(start, there).reshape(there - start, -1)
    return window


def rows_of(inputs: Inputs, tensor: str) -> Iterator[tuple[int, Floats]]:
    """(first row, rows) of a base tensor, a few megabytes at a time."""
    import numpy as np

    weight = inputs.base.weights[tensor]
    height = max(TILE, _MOST_WINDOW_NBYTES // max(1, weight.row_nbytes) // TILE * TILE)
    for start, stop in blocks_of(0, weight.rows, height):
        with np.errstate(invalid="ignore"):
            values = weight.read(start, stop).astype(np.float64)
        yield start, values
