"""Sums along an axis in a fixed order, by elementwise additions: the same bits on every machine.

numpy's own reductions choose their order by processor and memory layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def fold(values: Floats, axis: int) -> Floats:
    """The sum along one axis: the second half is added to the first until one is left.

    The order depends on the length of the axis alone, and the error grows with its logarithm.

    >>> import numpy as np
    >>> fold(np.arange(10.0).reshape(2, 5), axis=1)
    array([10., 35.])

    Args:
        values: float64 of any shape; an axis of length 0 sums to zero.
        axis: as numpy counts them.

    Returns: float64, without that axis.
    """
    import numpy as np

    left = np.moveaxis(values, axis, 0)
    if not len(left):
        return np.zeros(left.shape[1:])
    while len(left) > 1:
        half = len(left) // 2
        both = left[:half] + left[half : 2 * half]
        if len(left) % 2:
            both[0] += left[-1]
        left = both
    return np.array(left[0])


def row_squares(matrix: Floats) -> Floats:
    """Σ x² of each row: (rows, cols) → (rows,).

    >>> import numpy as np
    >>> row_squares(np.array([[3.0, 4.0], [1.0, 0.0]]))
    array([25.,  1.])
    """
    return fold(matrix * matrix, 1)


def column_squares(matrix: Floats) -> Floats:
    """Σ x² of each column: (rows, cols) → (cols,).

    The sum over a weight must not depend on how it is cut into windows: add tiles of `TILE` rows in their order.

    >>> import numpy as np
    >>> column_squares(np.array([[3.0, 4.0], [1.0, 0.0]]))
    array([10., 16.])
    """
    return fold(matrix * matrix, 0)
