"""Computes one weight and quantizes it again: all of its windows in turn, because the last one decides its scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.arithmetic import TILE, Tally
from loraformat.containers.quantized.recoding import Encoder, encoder_of
from loraformat.errors import NonFiniteValue
from loraformat.merger.compute.apply import blocks_of
from loraformat.merger.compute.computer import Computer
from loraformat.merger.compute.prepared import Steps
from loraformat.merger.compute.retention import tally_of
from loraformat.merger.compute.windows import Resources, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit
from loraformat.merger.write.tasks import Done, Target, Task
from loraformat.model.checkpoint import Checkpoint
from loraformat.storage import Run, digest_of, new_hash

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Singles: TypeAlias = NDArray[np.float32]

_COPY_NBYTES = 16 << 20
_ARRAYS = 6  # of a window, in float64, that are in memory beside those of an ordinary edit


def recoded_task(computer: Computer, edit: Edit, inputs: Inputs, limits: Resources, target: Target) -> Task:
    """The task that writes all parts of a weight.

    Where scales are quantized too, the weight is computed twice: its codes need all of its scales. A weight that comes
    out as it was keeps its codes, which fresh scales would change.
    """

    def run() -> Done:
        assert inputs.base.quantized is not None
        encoder = encoder_of(inputs.base.quantized, edit.tensor)
        weight = _Weight(computer, edit, inputs, limits, encoder)
        if encoder.needs_scales:
            for start, _, exact in weight.windows():
                encoder.scan(weight.singles(exact, start), start * weight.lines)
        codes, total, done = encoder.parts[0], new_hash(), 0
        tallies: list[Tally] = []
        is_changed = False
        for start, base, exact in weight.windows():
            values = weight.singles(exact, start)
            data, decoded = encoder.encode(values, start * weight.lines)
            total.update(data)
            target.writer.write_at(target.entries[codes.name].span.offset + done, memoryview(data))
            done += len(data)
            tallies += _tallies(base, decoded.reshape(base.shape), exact)
            is_changed = is_changed or not _are_equal(base, exact)
        if not is_changed:
            return _kept(edit, encoder, inputs.base.quantized.stored, target)
        span = target.entries[codes.name].span
        assert done == span.nbytes
        parts = [Done(codes.name, done, run=Run(span.offset, span.nbytes, total.hexdigest()))]
        parts += [_written(target, name, data) for name, data in encoder.rest().items()]
        return Done(edit.tensor, sum(part.nbytes for part in parts), tallies=tuple(tallies), parts=tuple(parts))

    return run


class _Weight:
    """A weight as its encoder needs it: windows of rows that do not cut a block of codes."""

    def __init__(self, computer: Computer, edit: Edit, inputs: Inputs, limits: Resources, encoder: Encoder) -> None:
        self._computer, self._edit, self._inputs, self._limits = computer, edit, inputs, limits
        # Rows of the encoder, along the last axis alone, in a row of the edit.
        self.lines = edit.matrix[1] // edit.shape[-1] if len(edit.shape) > 1 else 1
        self._unit = encoder.unit // math.gcd(encoder.unit, self.lines)
        self._steps: Steps = computer.steps(edit)

    def windows(self) -> Iterator[tuple[int, Floats, Floats]]:
        """(first row, values of the base, exact result), each (k, columns), of all windows in order."""
        limits = replace(self._limits, memory_nbytes=self._limits.memory_nbytes // _ARRAYS)
        for start, stop in windows(self._edit, self._inputs, limits, self._unit):
            base, exact = self._computer.exact(self._edit, self._steps, start, stop)
            yield start, base, exact

    def singles(self, exact: Floats, start: int) -> Singles:
        """The result rounded to float32, in rows of the last axis. Raises: NonFiniteValue (LF402)."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            values = exact.astype(np.float32)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = (int(number) for number in bad[0])
            text = (
                f"the merged value at row {start + row}, column {column} is NaN or infinite, which quantized "
                "weights cannot hold"
            )
            raise NonFiniteValue(text, where=self._edit.tensor)
        return values.reshape(-1, values.shape[1] // self.lines)


def _tallies(base: Floats, decoded: Singles, exact: Floats) -> Iterator[Tally]:
    for low, high in blocks_of(0, len(base), TILE):
        rows = slice(low, high)
        yield tally_of(base[rows], decoded[rows], exact[rows] - base[rows], is_recoded=True)


def _are_equal(base: Floats, exact: Floats) -> bool:
    import numpy as np

    return bool(np.array_equal(base, exact))


def _kept(edit: Edit, encoder: Encoder, stored: Checkpoint, target: Target) -> Done:
    """All parts of a weight as the base has them; text that the output has more room for ends in spaces."""
    parts = []
    for part in encoder.parts:
        weight, span, total, done = stored.weights[part.name], target.entries[part.name].span, new_hash(), 0
        step = max(1, _COPY_NBYTES // max(1, weight.row_nbytes))
        pieces = (bytes(weight.raw(row, min(row + step, weight.rows))) for row in range(0, weight.rows, step))
        for data in (*pieces, b" " * (span.nbytes - stored.tensors[part.name].span.nbytes)):
            total.update(data)
            target.writer.write_at(span.offset + done, memoryview(data))
            done += len(data)
        assert done == span.nbytes
        parts.append(Done(part.name, done, run=Run(span.offset, span.nbytes, total.hexdigest())))
    numel = math.prod(edit.shape)
    tallies = (Tally(unchanged=numel, numel=numel),)
    return Done(edit.tensor, sum(part.nbytes for part in parts), tallies=tallies, parts=tuple(parts))


def _written(target: Target, name: str, data: bytes) -> Done:
    span = target.entries[name].span
    assert len(data) == span.nbytes
    target.writer.write_at(span.offset, memoryview(data))
    return Done(name, len(data), run=Run(span.offset, span.nbytes, digest_of(data)))
