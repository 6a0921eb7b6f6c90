"""Rows of one tensor of the output, computed in float64 from the base and the updates that land on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loraformat.errors import MergeError
from loraformat.merger.inputs import Inputs
from loraformat.merger.verify.reference.combination import Change, Combination
from loraformat.merger.verify.reference.expected import HINT, Expected, Reference, Share
from loraformat.merger.verify.reference.kinds import effects
from loraformat.merger.verify.reference.kinds.effect import Effect, Landed, Matrix
from loraformat.merger.verify.reference.sites import Run
from loraformat.merger.verify.reference.sources import as_rows, base_rows
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.updates import Replace, Rows

if TYPE_CHECKING:
    from loraformat.merger.verify.reference.kinds.effect import Blocks
    from loraformat.model.floats import Floats

_BLOCK_NBYTES = 8 << 20


class Computed:
    """One tensor, whose factors are read when the first rows are asked for; for any number of threads."""

    def __init__(self, expected: Expected, reference: Reference, inputs: Inputs) -> None:
        self.expected, self._inputs = expected, inputs
        self._source = as_rows(expected.source, expected.axes)
        self._reference = reference
        rows, cols = expected.matrix
        self._effects: list[tuple[Share, Effect]] = []
        self._combined: list[tuple[Run, Combination]] = []
        is_sum = not any(isinstance(share.update, (Replace, Rows)) for share in expected.shares)
        if reference.arithmetic.method and len(expected.shape) > 1 and is_sum:
            self._combined = list(self._combinations())
            return
        for share in expected.shares:
            matrix = Matrix(rows, cols, self._base, self._origin, partial(self._other, share))
            self._effects.append((share, effects.effect_of(_landed(share, share.factor), matrix)))

    @property
    def unit(self) -> int:
        """Rows that are computed together."""
        return min(math.lcm(1, *(effect.unit for _, effect in self._effects)), max(1, self.expected.matrix[0]))

    @property
    def needs_all_rows(self) -> bool:
        """Whether no row can be computed without a pass over a whole matrix of the base."""
        one_by_one = any(effect.needs_all_rows for _, effect in self._effects)
        return one_by_one or any(one.needs_all_rows for _, one in self._combined)

    def rows(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Rows of the base, and what they must be in the output before rounding; whole units of them."""
        import numpy as np

        with np.errstate(all="ignore"):  # what is not finite is compared as it is
            return self._computed(start, stop)

    def _computed(self, start: int, stop: int) -> tuple[Floats, Floats]:
        base = self._rows(start, stop)
        origin = self._overwritten(base, start, stop)
        value = origin.copy()
        for share, effect in self._effects:
            if effect.overwrites:
                continue
            low, high = max(start, share.run.at), min(stop, share.run.at + share.run.count)
            if low < high:
                effect.once()
                here = slice(low - start, high - start)
                value[here] = effect(value[here], origin[here], low - share.run.at, high - share.run.at)
        for here, added, _ in self._added(start, stop):
            value[here] += added
        return base, value

    def _combinations(self) -> Iterator[tuple[Run, Combination]]:
        """Runs of rows, and how the changes of all adapters on them become one."""
        groups: dict[tuple[int, int | None], dict[int, list[Share]]] = {}
        for share in self.expected.shares:
            groups.setdefault((share.run.at, share.run.expert), {}).setdefault(share.adapter, []).append(share)
        for by_adapter in groups.values():
            first = next(iter(by_adapter.values()))[0]
            cols, run = self.expected.matrix[1], first.run
            label = first.weight if run.expert is None else f"{first.weight}:{run.expert}"
            label = f"{label}@{run.first}" if run.first else label
            changes = [self._change(several) for several in by_adapter.values()]
            yield run, Combination(changes, (run.count, cols), label, self._reference.arithmetic)

    def _change(self, shares: Sequence[Share]) -> Change:
        """What one adapter adds to a run of rows."""
        rows, cols = self.expected.matrix
        matrix = Matrix(rows, cols, self._base, self._origin, partial(self._other, shares[0]))
        found = [effects.effect_of(_landed(share, share.scale), matrix) for share in shares]

        def added(low: int, high: int) -> Floats:
            import numpy as np

            value = np.zeros((high - low, cols))
            for effect in found:
                effect.once()
                value = effect(value, value, low, high)
            return value

        return Change(added, shares[0].strength)

    def _added(self, start: int, stop: int) -> Iterator[tuple[slice, Floats, Floats]]:
        """(rows of a block, what combinations add to them, how far that may be off)."""
        for run, combination in self._combined:
            low, high = max(start, run.at), min(stop, run.at + run.count)
            if low < high:
                yield slice(low - start, high - start), *combination.rows(low - run.at, high - run.at)

    def slack(self, start: int, stop: int) -> Floats | float:
        """See `Effect`: of all updates on these rows."""
        if self._combined:
            import numpy as np

            room = np.zeros((stop - start, self.expected.matrix[1]))
            for here, _, off in self._added(start, stop):
                room[here] += off
            return room
        origin = self._overwritten(self._rows(start, stop), start, stop)
        return sum((effect.slack(origin) for _, effect in self._effects), 0.0)

    def _overwritten(self, base: Floats, start: int, stop: int) -> Floats:
        for _, effect in self._effects:
            if effect.overwrites:
                base = effect(base, base, start, stop)
        return base

    def _rows(self, start: int, stop: int) -> Floats:
        """Rows of the base, zero where it lacks them."""
        import numpy as np

        there = max(start, min(stop, _size(self._source)[0]))
        rows = np.zeros((stop - start, self.expected.matrix[1]))
        if there > start:
            rows[: there - start] = base_rows(self._inputs, self._source, start, there).reshape(there - start, -1)
        return rows

    def _other(self, share: Share, weight: str) -> tuple[Blocks, bool]:
        """Another weight of the base, from first to last row, and whether it is stored as (in, out)."""
        found = self._reference.sites[share.adapter].find(weight)
        if found is None or not found[0].tensor:
            raise MergeError(f"{weight}: the reference cannot read it as one matrix", where="verify", hint=HINT)
        stored = self._reference.tensors[found[0].tensor].source
        return _blocks_of(self._inputs, stored, *_size(stored)), found[1]

    def _base(self) -> Blocks:
        rows, cols = self.expected.matrix
        for start, stop in _steps(rows, cols):
            yield start, self._rows(start, stop)

    def _origin(self) -> Blocks:
        for start, rows in self._base():
            yield start, self._overwritten(rows, start, start + len(rows))


def _landed(share: Share, factor: float) -> Landed:
    return Landed(share.update, factor, share.is_transposed, share.run.expert, share.run.first)


def _size(stored: StoredTensor) -> tuple[int, int]:
    return (stored.shape[0] if stored.shape else 1), math.prod(stored.shape[1:])


def _steps(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    height = max(1, _BLOCK_NBYTES // (8 * max(1, cols)))
    return ((start, min(start + height, rows)) for start in range(0, rows, height))


def _blocks_of(inputs: Inputs, stored: StoredTensor, rows: int, cols: int) -> Blocks:
    for start, stop in _steps(rows, cols):
        yield start, base_rows(inputs, stored, start, stop)
