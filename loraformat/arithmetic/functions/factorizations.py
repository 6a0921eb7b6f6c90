"""Solving linear equations and orthonormal columns, in one fixed order: the same bytes on every machine.

LAPACK splits and orders its sums by processor and number of threads. What is here is slower and does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic.products import multiply
from loraformat.arithmetic.sums import fold

if TYPE_CHECKING:
    from typing import TypeVar

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    AnyFloat = TypeVar("AnyFloat", np.float32, np.float64)

# Columns that are eliminated one by one before all to their right are updated by one product.
_PANEL = 32


def solved(left: Floats, right: Floats) -> Floats:
    """X with left @ X = right, for each of a stack of matrices: Gaussian elimination with partial pivoting.

    A singular matrix gives infinities or NaN.

    Args:
        left: (count, n, n).
        right: (count, n, cols).

    Returns: (count, n, cols).

    >>> import numpy as np
    >>> solved(np.array([[[0.0, 2.0], [4.0, 0.0]]]), np.array([[[2.0], [8.0]]]))[0]
    array([[2.],
           [1.]])
    """
    import numpy as np

    size = left.shape[-1]
    work = np.ascontiguousarray(np.concatenate([left, right], axis=-1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for start in range(0, size, _PANEL):
            _eliminate(work, start, min(start + _PANEL, size))
        result = work[:, :, size:]
        for start in reversed(range(0, size, _PANEL)):
            stop = min(start + _PANEL, size)
            for k in reversed(range(start, stop)):
                result[:, k] /= work[:, k, k, None]
                result[:, start:k] -= work[:, start:k, k, None] * result[:, k, None]
            if start:
                result[:, :start] -= multiply(work[:, :start, start:stop], result[:, start:stop])
    return result


def _eliminate(work: Floats, start: int, stop: int) -> None:
    """Columns `start:stop` of all matrices made zero below the diagonal, in place; the factors stay where zeros are."""
    import numpy as np

    size, each = work.shape[1], np.arange(len(work))
    for k in range(start, stop):
        pivots = k + np.argmax(np.abs(work[:, k:, k]), axis=1)
        rows = work[each, pivots]
        work[each, pivots] = work[:, k]
        work[:, k] = rows
        work[:, k + 1 :, k] /= work[:, k, k, None]
        work[:, k + 1 :, k + 1 : stop] -= work[:, k + 1 :, k, None] * work[:, k, None, k + 1 : stop]
    for k in range(start, stop):
        work[:, k + 1 : stop, stop:] -= work[:, k + 1 : stop, k, None] * work[:, k, None, stop:]
    if stop < size:
        work[:, stop:, stop:] -= multiply(work[:, stop:, start:stop], work[:, start:stop, stop:])


def orthonormal(columns: NDArray[AnyFloat]) -> NDArray[AnyFloat]:
    """Q of columns = QR by Householder's reflections, with the signs that LAPACK gives it.

    Each reflection turns a column away from its leading value, so a diagonal value of R has the opposite sign. All but
    the sums of products, which are of float64, is computed in the dtype of the columns.

    Args:
        columns: (rows, cols), rows >= cols.

    Returns: (rows, cols).

    Source: LAPACK 3.12, dgeqr2, dlarfg and dorg2r.

    >>> import numpy as np
    >>> orthonormal(np.array([[3.0], [4.0]]))
    array([[-0.6],
           [-0.8]])
    """
    import numpy as np

    rest = np.array(columns)
    reflections = []
    for k in range(columns.shape[1]):
        vector, factor = _reflection(rest[k:, k])
        rest[k:, k:] -= _reflected(vector, factor, rest[k:, k:])
        reflections.append((vector, factor))
    result: NDArray[AnyFloat] = np.eye(*columns.shape, dtype=columns.dtype)
    for k, (vector, factor) in reversed(list(enumerate(reflections))):
        result[k:, k:] -= _reflected(vector, factor, result[k:, k:])
    return result


def _reflection(column: NDArray[AnyFloat]) -> tuple[NDArray[AnyFloat], AnyFloat]:
    """(v, t) with (I - t v vᵀ) column = (± norm, 0, …, 0) and v[0] = 1."""
    import numpy as np

    wide = column.astype(np.float64)
    square = fold(wide * wide, 0)
    vector = np.zeros_like(column)
    vector[0] = 1
    if square == wide[0] * wide[0]:
        return vector, column.dtype.type(0)
    norm = np.sqrt(square).astype(column.dtype)
    turned = -np.copysign(norm, column[0])
    vector[1:] = column[1:] / (column[0] - turned)
    return vector, (turned - column[0]) / turned


def _reflected(vector: NDArray[AnyFloat], factor: AnyFloat, rest: NDArray[AnyFloat]) -> NDArray[AnyFloat]:
    import numpy as np

    sums = fold(vector.astype(np.float64)[:, None] * rest, 0)
    return np.asarray((factor * vector)[:, None] * sums.astype(vector.dtype))
