"""Rows of a written tensor compared with what they must be, computed again in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.containers import weight_of
from loraformat.errors import MergeError
from loraformat.merger.apply import apply, blocks_of
from loraformat.merger.copies import Inputs
from loraformat.merger.plan import Edit
from loraformat.merger.steps import Steps, compute_dtype
from loraformat.merger.windows import read_window
from loraformat.model.checkpoint import BaseWeight, StoredTensor
from loraformat.model.floats import decoded, unit_in_last_place
from loraformat.model.tensors import DType
from loraformat.storage.base import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_ROWS_AT_ONCE = 8
# What sums of a few hundred terms lose, against the largest value of their row.
_LOST = {DType.F32: 2.0**-16, DType.F64: 2.0**-44}


def compare_rows(
    edit: Edit,
    steps: Steps,
    inputs: Inputs,
    output: Store,
    stored: StoredTensor,
    rows: tuple[int, int],
    accumulate: str,
) -> None:
    """Compare rows of an edited tensor with their exact values: as near as rounding and the arithmetic leave them.

    Args:
        steps: of the edit, in float64.
        rows: (start, stop), whole units of the edit.
        accumulate: as in Arithmetic.

    Raises: MergeError (LF801): a value is farther away than a unit in the last place, and what sums lose; or only one
        of the two is finite, or a number.
    """
    import numpy as np

    start, stop = rows
    base, exact = _again(edit, steps, inputs, start, stop)
    found = _values(weight_of(output, edit.tensor, stored).as_matrix(edit.row_axes), start, stop).reshape(exact.shape)
    if _are_near(exact, found, DType[edit.dtype]):
        return
    lost = _LOST[compute_dtype(edit, inputs, accumulate)]
    for low, high in blocks_of(0, stop - start, _ROWS_AT_ONCE):
        near = slice(low, high)
        room = _room(base[near], exact[near], found[near], DType[edit.dtype], lost)
        bad = np.argwhere(_is_far(exact[near], found[near], room) | ~np.isfinite(found[near]) & np.isfinite(base[near]))
        if len(bad):
            row, column = (int(number) for number in bad[0])
            raise MergeError(
                f"{edit.tensor}: row {start + low + row}, column {column} is {float(found[low + row, column])!r} in "
                f"the file, computed again it is {float(exact[low + row, column])!r}",
                where=stored.file,
                hint="the disk or the memory of this machine may be faulty",
            )


def _again(edit: Edit, steps: Steps, inputs: Inputs, start: int, stop: int) -> tuple[Floats, Floats]:
    """(W, W') of rows in float64: by numpy where products are added, not by the code that wrote them."""
    import numpy as np

    if not steps.is_plain:
        import torch

        window = read_window(inputs, edit, start, stop, torch.float64)
        return window.numpy().copy(), apply(window, start, *steps.get()).numpy()
    weight = inputs.base.weights[edit.source].as_matrix(edit.row_axes)
    there = max(0, min(stop, weight.rows) - start)
    base = _values(weight, start, start + there).reshape(there, edit.matrix[1])
    base = np.pad(base, ((0, stop - start - there), (0, 0))) if there < stop - start else base
    left, right = steps.factors()
    exact = left[start:stop] @ right
    exact += base
    return base, exact


def _values(weight: BaseWeight, start: int, stop: int) -> Floats:
    """Rows of a tensor as float64, in any shape."""
    import numpy as np

    if weight.is_copyable and weight.dtype.is_floating:
        return decoded(weight.raw(start, stop), weight.dtype)
    return np.asarray(weight.read(start, stop).double().numpy())


def _are_near(exact: Floats, found: Floats, dtype: DType) -> bool:
    """Whether all values are finite and less than a unit in the last place from the exact ones, as nearly all are."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinity minus itself
        distance = np.abs(found - exact)
    return bool((distance < unit_in_last_place(exact, dtype)).all())


def _is_far(exact: Floats, found: Floats, room: Floats) -> NDArray[np.bool_]:
    """Whether values are farther apart than there is room; infinity and NaN must be the same."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinity minus itself
        is_far = np.abs(found - exact) > room
    is_same = (found == exact) | np.isnan(found) & np.isnan(exact)
    return np.where(np.isfinite(exact) & np.isfinite(found), is_far, ~is_same)


def _room(base: Floats, exact: Floats, found: Floats, dtype: DType, lost: float) -> Floats:
    """How far a value may be from the exact one: a unit in the last place, and what the sums before lose."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        unit = unit_in_last_place(np.fmax(np.abs(exact), np.abs(found)), dtype)
        largest = np.nan_to_num(np.abs(base) + np.abs(exact - base), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(unit + lost * largest.max(axis=1, keepdims=True, initial=0.0), np.float64)
