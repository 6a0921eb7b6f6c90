"""Rows of a written tensor compared with what they must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import MergeError
from loraformat.merger.verify.reference import Computed
from loraformat.merger.verify.reference.sources import as_rows, rows_of
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.floats import unit_in_last_place
from loraformat.model.tensors import DType
from loraformat.storage.base import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.merger.plan.data import Arithmetic
    from loraformat.model.floats import Floats

_ROWS_AT_ONCE = 8
_LOST = 2.0**-44  # what sums of a few hundred terms lose, against the largest value of their row


def compare_rows(
    computed: Computed, output: Store, stored: StoredTensor, rows: tuple[int, int], arithmetic: Arithmetic
) -> None:
    """Compare rows of a tensor with the reference: as near as rounding and the arithmetic leave them.

    Args:
        stored: the tensor in the output.
        rows: (start, stop), whole units of the tensor.

    Raises: MergeError (LF801): a value is farther away than rounding explains, half a unit in the last place or one
        where it is stochastic, and what sums lose; or only one of the two is finite, or a number.
    """
    import numpy as np

    start, stop = rows
    expected = computed.expected
    base, exact = computed.rows(start, stop)
    found = rows_of(output, as_rows(stored, expected.axes), start, stop).reshape(exact.shape)
    units = 0.5 if arithmetic.rounding == "nearest" else 1.0
    if _are_near(exact, found, expected.dtype, units):
        return
    slack = np.broadcast_to(np.asarray(computed.slack(start, stop)), exact.shape)
    for low in range(0, stop - start, _ROWS_AT_ONCE):
        near = slice(low, low + _ROWS_AT_ONCE)
        room = _room(base[near], exact[near], found[near], expected.dtype, units) + slack[near]
        bad = np.argwhere(_is_far(exact[near], found[near], room) | ~np.isfinite(found[near]) & np.isfinite(base[near]))
        if len(bad):
            row, column = (int(number) for number in bad[0])
            raise MergeError(
                f"{expected.name}: row {start + low + row}, column {column} is {float(found[low + row, column])!r} in "
                f"the file, but the independent computation gives {float(exact[low + row, column])!r}",
                where=stored.file,
                hint="the disk or the memory of this machine may be faulty; otherwise please report a bug in "
                "loraformat",
            )


def _are_near(exact: Floats, found: Floats, dtype: DType, units: float) -> bool:
    """Whether all values are finite and within `units` in the last place of the exact ones, as nearly all are."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinity minus itself
        distance = np.abs(found - exact)
    return bool((distance <= units * unit_in_last_place(exact, dtype)).all() and np.isfinite(found).all())


def _is_far(exact: Floats, found: Floats, room: Floats) -> NDArray[np.bool_]:
    """Whether values are farther apart than there is room; infinity and NaN must be the same."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinity minus itself
        is_far = np.abs(found - exact) > room
    is_same = (found == exact) | np.isnan(found) & np.isnan(exact)
    return np.where(np.isfinite(exact) & np.isfinite(found), is_far, ~is_same)


def _room(base: Floats, exact: Floats, found: Floats, dtype: DType, units: float) -> Floats:
    """How far a value may be from the exact one: what rounding may do, and what the sums before lose."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        unit = unit_in_last_place(np.fmax(np.abs(exact), np.abs(found)), dtype)
        largest = np.nan_to_num(np.abs(base) + np.abs(exact - base), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(units * unit + _LOST * largest.max(axis=1, keepdims=True, initial=0.0), np.float64)
