"""What each kind of update makes of rows of a stored weight, in float64, from its formula.

Rows are those of the tensor as it is stored. Where it is stored transposed, as (in, out), a block of its rows is a
block of columns of the weight W (out, in) of which the formulas speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from loraformat.merger.verify.reference.kinds.effect import Effect, FactorMatrix, Landed, Matrix
from loraformat.merger.verify.reference.kinds.multiplicative import MULTIPLICATIVE
from loraformat.merger.verify.reference.kinds.sums import SUMS
from loraformat.merger.verify.reference.sources import factor_rows
from loraformat.model.updates import Replace, Rows, Update, no_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats


class _Overwriting(Effect):
    """Rows that are replaced, whatever stood there."""

    overwrites = True

    @cached_property
    def table(self) -> FactorMatrix:
        value = self.landed.update.value if isinstance(self.landed.update, Replace) else None
        assert value is not None
        return FactorMatrix(value if value.shape else value.reshape(1))

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        import numpy as np

        assert isinstance(self.landed.update, Rows)
        return np.asarray(self.landed.update.indices, np.int64)

    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:  # noqa: ARG002
        import numpy as np

        update = self.landed.update
        if isinstance(update, Replace):
            table = self.table
            return (table.all.T[low:high] if self.landed.is_transposed else table.rows(low, high)).reshape(value.shape)
        assert isinstance(update, Rows)
        result: Floats = value.copy()
        for number in np.flatnonzero((self.indices >= low) & (self.indices < high)):
            result[self.indices[number] - low] = factor_rows(update.values, int(number), int(number) + 1)[0]
        return result


EFFECTS: Mapping[type[Update], Callable[[Landed, Matrix], Effect]] = {
    **SUMS,
    **MULTIPLICATIVE,
    Replace: _Overwriting,
    Rows: _Overwriting,
}


def effect_of(landed: Landed, matrix: Matrix) -> Effect:
    """The effect of an update on a tensor. Raises: see `check_effects`."""
    check_effects([type(landed.update)])
    return EFFECTS[type(landed.update)](landed, matrix)


def check_effects(kinds: Iterable[type[Update]]) -> None:
    """Raises: UnsupportedUpdate (LF013): the reference has no effect for a class of update."""
    for kind in kinds:
        if kind not in EFFECTS:
            raise no_line(kind, "EFFECTS in loraformat/merger/verify/reference/kinds/effects.py")
