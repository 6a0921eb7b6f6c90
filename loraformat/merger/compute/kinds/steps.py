"""What an update made ready does to blocks of rows: it adds, sets or multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, Union

from loraformat.arithmetic import pack, product
from loraformat.errors import MergeError, NonFiniteValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats
    from loraformat.model.tensors import LazyTensor, Values

Delta: TypeAlias = Callable[[int, int], "Floats"]
Transform: TypeAlias = Callable[["Floats", int, int], "Floats"]


def product_of(left: Floats, right: Floats) -> Delta:
    """A Delta that is rows of left · right."""
    packed = pack(left, right)
    return lambda start, stop: product(packed, start, stop)


@dataclass(frozen=True, slots=True)
class Addition:
    """A term that adds: `delta(start, stop)` are rows of s·ΔW as stored, (stop - start, cols).

    Attributes:
        magnitude: DoRA, in the stored orientation: (rows, 1) where `is_per_row`, else (1, cols); else None.
        is_per_row: whether each stored row has its norm; if not, each column has, and a whole pass must come first.
        span: (start, stop) of the rows of the tensor that it adds to, from which `delta` and `magnitude` count; None
            for all.
    """

    delta: Delta
    magnitude: Floats | None = None
    is_per_row: bool = True
    span: tuple[int, int] | None = None

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude."""
        return self.magnitude is not None

    @property
    def needs_column_norms(self) -> bool:
        """Whether norms run over all rows of the stored tensor."""
        return self.is_dora and not self.is_per_row


@dataclass(frozen=True, slots=True)
class Overwrite:
    """A term that sets rows: `rows(start, stop)` gives (row numbers from `start` on, their values).

    Attributes:
        whole: the values of all rows, in their order, where it sets all; None where it sets some.
    """

    rows: Callable[[int, int], tuple[NDArray[np.int64] | slice, Floats]]
    whole: LazyTensor | None = None


@dataclass(frozen=True, slots=True)
class Multiplication:
    """A term that multiplies: `transform(values, start, stop)` are rows of the weight as stored after it.

    Attributes:
        unit: rows that must stand together: 1, or the size of a block that mixes rows.
        is_sum: whether `transform` is given the base's rows, before other updates, and its changes of them are added.
    """

    transform: Transform
    unit: int = 1
    is_sum: bool = False


Step: TypeAlias = Union[Addition, Overwrite, Multiplication]


def finite(value: Values, where: str) -> Floats:
    """`value` as float64; raises NonFiniteValue (LF402) where it holds NaN or infinity."""
    import numpy as np

    if not np.isfinite(value).all():
        raise not_finite(where)
    return value.astype(np.float64, copy=False)


def not_finite(where: str) -> NonFiniteValue:
    """The error about an adapter's value that is NaN or infinite."""
    return NonFiniteValue("the adapter holds NaN or infinity", where=where, hint="the training run may have diverged")


def stated_scale(scale: float | None, where: str) -> float:
    """The scale; raises MergeError (LF206) where it is unknown."""
    if scale is None:
        raise MergeError("the scale is unknown because no alpha was stated", where=where, hint="pass it with --alpha A")
    return scale
