"""Whether two updates change a weight by the same amount: bit for bit, or up to the rounding of their factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.model.floats import SMALLEST_LOST, float64_of, quietly
from loraformat.model.tensors import row_blocks
from loraformat.model.updates import Dense, LowRank, Replace, Rows, Update, scale_of, settings, tensors

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_BLOCK_NUMEL = 1 << 22
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one update compares with another.

    Attributes:
        is_exact: all values and factors are equal, bit for bit.
        error: largest difference of a value of the dense updates, as a share of what rounding may do there.
        is_same_kind: False where they cannot be compared at all.
    """

    is_exact: bool
    error: float = 0.0
    is_same_kind: bool = True

    @property
    def holds(self) -> bool:
        """Whether the two change a weight by the same amount."""
        return self.is_same_kind and self.error <= 1.0


@quietly
def agreement(found: Update, wanted: Update, roundoff: float) -> Agreement:
    """How `found` compares with `wanted`.

    Args:
        roundoff: largest relative error that each value of a tensor may have, 0 where none was rounded.

    The bound of a value of a low-rank update is |scale| · Σ |up| · |down| · (2 · roundoff + roundoff²), of any other
    value |value| · roundoff. To it comes what rounding does to numbers below the normal ones of a dtype, and the share
    of this comparison's own sums in float64.
    """
    if type(found) is not type(wanted) or _facts(found) != _facts(wanted):
        return Agreement(is_exact=False, is_same_kind=False)
    if _shapes(found) == _shapes(wanted) and scale_of(found) == scale_of(wanted) and _are_equal(found, wanted):
        return Agreement(is_exact=True)
    if isinstance(found, LowRank) and isinstance(wanted, LowRank):
        return _compared(_low_ranks(found, wanted, roundoff))
    if isinstance(found, (Dense, Replace, Rows)) and _shapes(found) == _shapes(wanted):
        return _compared(_values(found, wanted, roundoff))
    return Agreement(is_exact=False, is_same_kind=False)


def _facts(update: Update) -> dict[str, object]:
    """What must be equal whatever the values are; of a convolution the shape, which has the kernel in it."""
    found = {name: value for name, value in settings(update).items() if name not in ("scale", "kernel")}
    return found | {"shape": update.shape}


def _shapes(update: Update) -> list[tuple[int, ...]]:
    return [tensor.shape for _, tensor in tensors(update)]


def _are_equal(found: Update, wanted: Update) -> bool:
    import numpy as np

    for (_, one), (_, other) in zip(tensors(found), tensors(wanted), strict=True):
        if one.dtype is not other.dtype:
            return False
        for start, stop in row_blocks(one.shape, 1, _BLOCK_NUMEL):
            if not np.array_equal(one.read(start, stop), other.read(start, stop)):
                return False
    return True


def _compared(blocks: Iterator[tuple[Floats, Floats, Floats]]) -> Agreement:
    """From (found, wanted, bound) of all blocks. What is not finite agrees with its like alone."""
    import numpy as np

    worst = 0.0
    for found, wanted, bound in blocks:
        is_same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
        shares = np.where(is_same, 0.0, abs(found - wanted) / (bound + _TINY))
        worst = max(worst, float(np.where(np.isnan(shares), np.inf, shares).max(initial=0.0)))
    return Agreement(is_exact=False, error=worst)


def _low_ranks(found: LowRank, wanted: LowRank, roundoff: float) -> Iterator[tuple[Floats, Floats, Floats]]:
    assert found.scale is not None
    assert wanted.scale is not None
    share = 2 * roundoff + roundoff**2 + (found.rank + wanted.rank + 4) * 2.0**-52
    floors = [SMALLEST_LOST.get(tensor.dtype, 0.0) if roundoff else 0.0 for tensor in (found.up, found.down)]
    downs = float64_of(found.down), float64_of(wanted.down)
    for start, stop in row_blocks((wanted.up.shape[0], downs[1].shape[-1]), 1, _BLOCK_NUMEL):
        ups = [float64_of(update.up.rows(start, stop)) for update in (found, wanted)]
        products = found.scale * (ups[0] @ downs[0]), wanted.scale * (ups[1] @ downs[1])
        up, down = abs(ups[1]), abs(downs[1])
        lost = floors[0] * down.sum(axis=0)[None, :] + floors[1] * up.sum(axis=1)[:, None]
        yield *products, abs(wanted.scale) * ((up @ down) * share + 2 * lost)
    if found.magnitude is not None and wanted.magnitude is not None:
        one, other = float64_of(found.magnitude.vector), float64_of(wanted.magnitude.vector)
        yield one, other, abs(other) * roundoff


def _values(found: Update, wanted: Update, roundoff: float) -> Iterator[tuple[Floats, Floats, Floats]]:
    import numpy as np

    factors = [1.0 if (scale := scale_of(update)) is None else scale for update in (found, wanted)]
    for (_, one), (_, other) in zip(tensors(found), tensors(wanted), strict=True):
        for start, stop in row_blocks(other.shape, 1, _BLOCK_NUMEL):
            exact = factors[1] * other.read(start, stop).astype(np.float64)
            found_here = factors[0] * one.read(start, stop).astype(np.float64)
            yield found_here, exact, abs(exact) * (roundoff + 2.0**-51)
