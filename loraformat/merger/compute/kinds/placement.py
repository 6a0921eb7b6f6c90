"""How an update meets the stored tensor that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from loraformat.matching import WHOLE, RowMap

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# (first row, rows of the base's tensor as stored), from the first to the last.
Windows: TypeAlias = Iterable[tuple[int, "Floats"]]


@dataclass(frozen=True, slots=True)
class BaseValues:
    """The un-merged values that an update may be computed from.

    Attributes:
        whole: the matrix that the update changes, as stored.
        windows: the same, window by window.
        operand: another weight, see `Kind.operand`: its windows, and whether it is stored as (in, out).
    """

    whole: Callable[[], Floats]
    windows: Callable[[], Windows]
    operand: Callable[[], tuple[Windows, bool]]


def _no_base() -> BaseValues:
    raise AssertionError("an update that is computed from the base is prepared without one")


@dataclass(frozen=True, slots=True)
class Placement:
    """How an update, which is in Linear orientation, meets a stored tensor.

    Attributes:
        transposed: whether the tensor is stored as (in, out).
        shape: (rows, cols) of the stored tensor, its trailing axes flattened; one column for a vector.
        where: for messages.
        part: which rows of the update are taken, and to which rows of the tensor they go.
        strength: by which what is added is multiplied.
        base: gives the values of the base.
    """

    transposed: bool
    shape: tuple[int, int]
    where: str
    part: RowMap = WHOLE
    strength: float = 1.0
    base: Callable[[], BaseValues] = _no_base
