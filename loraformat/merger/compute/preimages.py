"""Which base values a merged value may come from: what `unmerge` can know, value by value.

A merge adds D in float64 and rounds once. That is monotone in the base's value, so the values of the base's dtype that
give one merged value stand side by side: the value that subtraction gives is the only one where neither of its
neighbors would have become the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraformat.arithmetic import fold, product
from loraformat.merger.compute.apply import apply
from loraformat.merger.compute.prepared import Steps
from loraformat.merger.compute.rounding import nearest_bits, values_of
from loraformat.merger.compute.windows import Resources, read_window, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Arithmetic, Edit
from loraformat.model.floats import quietly, unit_in_last_place
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Bits = NDArray[np.unsignedinteger[Any]]


@dataclass(slots=True)
class Preimages:
    """What is known of the values that a merged weight was made from.

    Attributes:
        values: how many there are.
        unknown: those of which more than one value gives the merged one, and those that are not finite.
        unlike: those that no value gives: another update, or another way to round.
        bound: how far the value that subtraction gives may be from the base's where that is unknown and finite.
        not_finite: NaN and infinity, from which nothing can be subtracted; part of `unknown`.
    """

    values: int = 0
    unknown: int = 0
    unlike: int = 0
    bound: float = 0.0
    not_finite: int = 0

    def add(self, other: Preimages) -> None:
        """Take in more rows."""
        self.not_finite += other.not_finite
        self.values += other.values
        self.unknown += other.unknown
        self.unlike += other.unlike
        self.bound = max(self.bound, other.bound)


class Reversal:
    """One edited tensor of a merged model whose updates are taken out; threads may share it."""

    def __init__(self, edit: Edit, inputs: Inputs) -> None:
        """From an edit of the merged model whose terms have the negated strengths."""
        self._edit, self._inputs = edit, inputs
        self._back = Steps(edit, inputs, Arithmetic())
        terms = tuple(replace(term, strength=-term.strength) for term in edit.terms)
        self._forth = Steps(replace(edit, terms=terms), inputs, Arithmetic())

    def windows(self, limits: Resources) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of the windows to count."""
        return windows(self._edit, self._inputs, limits)

    @quietly
    def count(self, start: int, stop: int) -> Preimages:
        """What is known of the rows of a window."""
        import numpy as np

        dtype = DType[self._edit.dtype]
        after = read_window(self._inputs, self._edit, start, stop)
        wanted = nearest_bits(after, dtype)
        found = _merged(self._back, wanted, dtype, start)
        above, below = _neighbors(found)
        before = values_of(found, dtype)
        is_finite = np.isfinite(after) & np.isfinite(before)
        unlike = (_merged(self._forth, found, dtype, start) != wanted) & is_finite
        unknown = (_merged(self._forth, above, dtype, start) == wanted) | (
            _merged(self._forth, below, dtype, start) == wanted
        )
        unknown &= is_finite & ~unlike
        steps = unit_in_last_place(after[unknown], dtype) + unit_in_last_place(before[unknown], dtype)
        return Preimages(
            values=wanted.size,
            unknown=int(np.count_nonzero(unknown | ~is_finite)),
            unlike=int(np.count_nonzero(unlike)),
            bound=float(steps.max(initial=0.0)) / 2,
            not_finite=int(np.count_nonzero(~is_finite)),
        )


# Merges that round the product, its scaling and the sum each by itself are off by no more: in units in the last place
# of the largest number of the row; along the update, as a share of it; and in all, as a share of the change.
_MOST_UNITS, _MOST_LEAN, _MOST_APART = 4.0, 0.02, 0.5


@dataclass(slots=True)
class Likeness:
    """How rows of a model compare with what a merge gives.

    Attributes:
        values: how many there are.
        unequal: those that are not the same, bit for bit.
        far: those of them that other ways to round do not explain.
        apart, change, update: Σ (found − wanted)², Σ (wanted − W)², ΣD², where D is what the merge adds to W.
        along: Σ (found − wanted) · D.
    """

    values: int = 0
    unequal: int = 0
    far: int = 0
    apart: float = 0.0
    change: float = 0.0
    update: float = 0.0
    along: float = 0.0

    def add(self, other: Likeness) -> None:
        """Take in more rows."""
        self.values += other.values
        self.unequal += other.unequal
        self.far += other.far
        self.apart += other.apart
        self.change += other.change
        self.update += other.update
        self.along += other.along

    @property
    def holds(self) -> bool:
        """Whether nothing but another way to round tells the two apart.

        An update at another strength leaves a share of itself, which no rounding does, however small the update is.
        """
        if not self.unequal:
            return True
        is_along = abs(self.along) > _MOST_LEAN * self.update
        return not self.far and not is_along and self.apart <= _MOST_APART**2 * self.change


class Repetition:
    """One edited tensor of a merge, computed once more and compared; threads may share it."""

    def __init__(self, edit: Edit, inputs: Inputs, arithmetic: Arithmetic) -> None:
        self._edit, self._inputs = edit, inputs
        self._steps = Steps(edit, inputs, arithmetic)

    def windows(self, limits: Resources) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of the windows to compare."""
        return windows(self._edit, self._inputs, limits)

    @quietly
    def compare(self, start: int, stop: int, found: Floats) -> Likeness:
        """Rows `start:stop` of the merge with those that were found, (rows, cols) of the edit's dtype."""
        import numpy as np

        dtype = DType[self._edit.dtype]
        before = read_window(self._inputs, self._edit, start, stop)
        result = _sum(self._steps, before, start)
        wanted, bits = nearest_bits(result, dtype), nearest_bits(found, dtype)
        stored = self._inputs.base.tensors[self._edit.source].dtype
        if stored is dtype:
            wanted = np.where(result == before, nearest_bits(before, dtype), wanted)
        unequal = wanted != bits
        exact = values_of(wanted, dtype)
        off, update = found - exact, result - before
        largest = np.maximum(np.maximum(np.abs(before), np.abs(found)), np.abs(update)).max(axis=1, initial=0.0)
        far = unequal & ~(np.abs(off) <= _MOST_UNITS * unit_in_last_place(largest, dtype)[:, None])
        return Likeness(
            values=bits.size,
            unequal=int(np.count_nonzero(unequal)),
            far=int(np.count_nonzero(far)),
            apart=_product(off, off),
            change=_product(exact - before, exact - before),
            update=_product(update, update),
            along=_product(off, update),
        )


def _product(one: Floats, other: Floats) -> float:
    """Σ of the products of two blocks of rows, value by value, in a fixed order."""
    return float(fold((one * other).reshape(-1), 0))


def _merged(steps: Steps, bits: Bits, dtype: DType, start: int) -> Bits:
    """What a merge writes for values of the base, in the base's own dtype: bits that it adds nothing to stay."""
    import numpy as np

    values = values_of(bits, dtype)
    result = _sum(steps, values, start)
    return np.asarray(np.where((result == values) | np.isnan(values), bits, nearest_bits(result, dtype)))


def _sum(steps: Steps, values: Floats, start: int) -> Floats:
    """Rows with all terms added, in float64, as `Computer` adds them."""
    if steps.is_plain:
        return values + product(steps.packed(), start, start + len(values))
    return apply(values.copy(), start, *steps.get())


def _neighbors(bits: Bits) -> tuple[Bits, Bits]:
    """The next number above and below each, -0 and 0 apart."""
    import numpy as np

    sign = np.array(1 << (8 * bits.dtype.itemsize - 1), bits.dtype)
    is_negative = (bits & sign) != 0
    one = np.array(1, bits.dtype)
    # From -0 the next above is 0 and from 0 the next below -0; all others are one away in magnitude.
    above = np.where(bits == sign, np.zeros_like(bits), np.where(is_negative, bits - one, bits + one))
    below = np.where(bits == 0, sign, np.where(is_negative, bits + one, bits - one))
    return above, below
