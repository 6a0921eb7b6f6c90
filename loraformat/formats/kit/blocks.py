"""Factors of one update made of several: blocks of columns that each reach some of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.model.tensors import DType, LazyTensor

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

Runs = Sequence[tuple[int, int]]


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices of one width and dtype, one below the other: (sum of rows, cols)."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)

    def read(start: int, stop: int) -> Values:
        import numpy as np

        return np.concatenate([part.load() for part in parts])[start:stop]

    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, read)


def chosen_rows(tensor: LazyTensor, rows: Sequence[int]) -> LazyTensor:
    """The rows of these numbers in this order, some perhaps more than once: (len(rows), ...)."""

    def read(start: int, stop: int) -> Values:
        import numpy as np

        return tensor.load()[np.asarray(rows[start:stop], np.int64)]

    return LazyTensor((len(rows), *tensor.shape[1:]), tensor.dtype, read)


def block_columns(parts: Sequence[tuple[LazyTensor, Runs]], rows: int) -> LazyTensor:
    """(rows, sum of the parts' columns): the columns of a part are zero but in the rows that it reaches.

    Args:
        parts: (height, width) and the runs (start, stop) of rows that its own rows fill one after the other; the
            lengths of the runs add up to `height`. All of one dtype.
    """
    width = sum(part.shape[1] for part, _ in parts)

    def read(start: int, stop: int) -> Values:
        import numpy as np

        whole = np.zeros((rows, width), parts[0][0].dtype.numpy)
        left = 0
        for part, runs in parts:
            values, taken = part.load(), 0
            for first, end in runs:
                whole[first:end, left : left + part.shape[1]] = values[taken : taken + end - first]
                taken += end - first
            left += part.shape[1]
        return whole[start:stop]

    return LazyTensor((rows, width), parts[0][0].dtype, read)


def zeros(shape: tuple[int, ...], dtype: DType) -> LazyTensor:
    """A tensor of zeros."""

    def read(start: int, stop: int) -> Values:
        import numpy as np

        return np.zeros((stop - start, *shape[1:]), dtype.numpy)

    return LazyTensor(shape, dtype, read)
