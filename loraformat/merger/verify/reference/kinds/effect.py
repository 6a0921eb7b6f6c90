"""The face of an effect, what it is given, and the matrices of an adapter, read as they are needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.merger.verify.reference.sources import factor_rows, factor_values
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Update

if TYPE_CHECKING:
    from typing import TypeAlias

    from loraformat.model.floats import Floats

    Blocks: TypeAlias = Iterable[tuple[int, Floats]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """The stored tensor that updates land on, seen as a matrix.

    Attributes:
        rows, cols: of the output.
        base: its rows from first to last as they are in the base, in blocks; those that it lacks are zero.
        origin: the same after rows were replaced, which is what DoRA's norms are those of.
        other: W of a weight by its name, from first to last row, and whether it is transposed.
    """

    rows: int
    cols: int
    base: Callable[[], Blocks]
    origin: Callable[[], Blocks]
    other: Callable[[str], tuple[Blocks, bool]]


@dataclass(frozen=True, slots=True)
class Landed:
    """An update, and how it meets the tensor.

    Attributes:
        factor: scale and strength together; 1 for kinds that have none.
        is_transposed: whether the tensor is stored as (in, out).
        expert: which matrix of a stack it is.
        first: the first row of the update, as stored, that counts.
    """

    update: Update
    factor: float = 1.0
    is_transposed: bool = False
    expert: int | None = None
    first: int = 0


class Effect(ABC):
    """An update on rows of a tensor. Values are computed when they are asked for first, and kept.

    Attributes:
        unit: rows that must stand together; 1 unless a formula mixes rows.
        overwrites: whether rows are replaced, which comes before all other updates.
    """

    unit = 1
    overwrites = False

    def __init__(self, landed: Landed, matrix: Matrix) -> None:
        self.landed, self.matrix = landed, matrix
        self._lock = Lock()

    @abstractmethod
    def __call__(self, value: Floats, origin: Floats, low: int, high: int) -> Floats:
        """Rows `low:high` after the update.

        Args:
            value: after the updates before.
            origin: before all of them, but for replaced rows.
        """

    def slack(self, origin: Floats) -> Floats | float:  # noqa: ARG002
        """How far values may be from these since they hang on a rounding that two right ways may decide differently."""
        return 0.0

    @property
    def needs_all_rows(self) -> bool:
        """Whether a row cannot be computed without a pass over a whole matrix of the base."""
        return False

    def once(self) -> None:
        """Compute what all rows need, in one thread."""
        with self._lock:
            self.prepare()

    def prepare(self) -> None:  # noqa: B027 - most effects need nothing beforehand
        """Compute what all rows need, where it is not there."""


# So many multiplications OpenBLAS makes in one thread; of a vector and a matrix fewer.
_TILE_WORK, _LINE_WORK, _TILE_ROWS, _MOST_RANK = 1 << 18, 1 << 13, 8, 256


def product(left: Floats, right: Floats) -> Floats:
    """The product of two factors, in tiles that BLAS does not divide among threads of its own.

    They wait for each other, turning, wherever the tasks of a merge keep the processors busy.
    """
    import numpy as np

    (rows, rank), cols = left.shape, right.shape[1]
    if rank > _MOST_RANK:
        return np.asarray(left @ right)
    work = _TILE_WORK // _TILE_ROWS if rows > 1 else _LINE_WORK
    width = max(64, work // max(1, rank))
    result = np.empty((rows, cols))
    for top in range(0, rows, _TILE_ROWS):
        for side in range(0, cols, width):
            place = slice(top, top + _TILE_ROWS), slice(side, side + width)
            np.matmul(left[place[0]], right[:, place[1]], out=result[place])
    return result


class FactorMatrix:
    """A matrix of an adapter: rows of it where they stand so in a file, else all of it, once."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    @cached_property
    def all(self) -> Floats:
        """All rows, trailing axes flattened."""
        values = factor_values(self._tensor)
        return values.reshape(values.shape[0], math.prod(values.shape[1:]))

    def rows(self, low: int, high: int) -> Floats:
        """Some rows."""
        return self.all[low:high] if self._tensor.raw is None else factor_rows(self._tensor, low, high)
