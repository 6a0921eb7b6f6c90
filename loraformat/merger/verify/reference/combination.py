"""Changes of several adapters combined by TIES or DARE: the formulas, value by value, in float64.

Source: Yadav et al., TIES-Merging, 2023; Yu et al., DARE, 2023; peft 0.21.2, utils/merge_utils.py: which signs
vote, and that weights do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from loraformat.merger.plan.data import Arithmetic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_BLOCK_NBYTES = 8 << 20
# Sums in another order may differ by so much of a magnitude, and of what was summed.
_NEAR, _NOISE = 2.0**-22, 2.0**-40


@dataclass(frozen=True, slots=True)
class Change:
    """What one adapter adds to some rows of a tensor: (rows from the first of them) → values, without its strength."""

    rows: Callable[[int, int], Floats]
    strength: float


class Combination:
    """All changes of the same rows."""

    def __init__(self, changes: Sequence[Change], shape: tuple[int, int], label: str, arithmetic: Arithmetic) -> None:
        self._changes, self._shape, self._label, self._how = changes, shape, label, arithmetic
        self._lock = Lock()

    @property
    def needs_all_rows(self) -> bool:
        """Whether a value is kept or not by all others of its matrix."""
        return self._how.method == "ties" and self._how.density < 1

    def rows(self, low: int, high: int) -> tuple[Floats, Floats]:
        """(what is added, how far it may be off where a rounding decides what is kept or which sign wins)."""
        import numpy as np

        each = [change.rows(low, high) for change in self._changes]
        left, doubt = [], np.zeros(each[0].shape, np.bool_)
        for number, values in enumerate(each):
            kept, is_near = self._kept(number, values, low)
            left.append(kept)
            doubt |= is_near
        strengths = [change.strength for change in self._changes]
        if self._how.method == "dare":
            return _total([w * x for w, x in zip(strengths, left, strict=True)]), np.zeros(each[0].shape)
        votes = left if self._how.sign == "total" else [np.sign(one) for one in left]
        total, sizes = _total(votes), _total([np.abs(one) for one in votes])
        doubt |= (np.abs(total) <= _NOISE * sizes) & (sizes > 0)
        largest = max(float(np.abs(one).max(initial=0)) for one in each)
        for one in left:
            doubt |= (one != 0) & (np.abs(one) <= _NOISE * largest)
        is_up = total >= 0
        added, count = np.zeros_like(each[0]), np.zeros_like(each[0])
        for weight, one in zip(strengths, left, strict=True):
            agrees = np.where(is_up, one > 0, one < 0)
            added += np.where(agrees, weight * one, 0.0)
            count += agrees
        most = _total([abs(w) * np.abs(x) for w, x in zip(strengths, each, strict=True)])
        return added / np.where(count == 0, 1, count), np.where(doubt, 2 * most / self._how.density, 0.0)

    def _kept(self, number: int, values: Floats, low: int) -> tuple[Floats, NDArray[np.bool_]]:
        """(what stays of some rows of a change, where that hangs on a rounding)."""
        import numpy as np

        how = self._how
        if how.method != "ties":
            chances = _chances(how.seed, self._label, number, low * self._shape[1], values.size).reshape(values.shape)
            return np.where(chances < how.density, values / how.density, 0.0), np.zeros(values.shape, np.bool_)
        if how.density >= 1:
            return values, np.zeros(values.shape, np.bool_)
        with self._lock:
            least = self._least[number]
        size = np.abs(values)
        return np.where(size >= least, values, 0.0), np.abs(size - least) <= _NEAR * least

    @cached_property
    def _least(self) -> list[float]:
        """Of each change the smallest magnitude that stays, to float32."""
        import numpy as np

        rows, cols = self._shape
        count, step, found = int(self._how.density * (rows * cols)), max(1, _BLOCK_NBYTES // (8 * cols)), []
        for change in self._changes:
            sizes = np.empty(rows * cols, np.float32)
            for low in range(0, rows, step):
                part = np.abs(change.rows(low, min(low + step, rows)))
                sizes[low * cols : low * cols + part.size] = part.reshape(-1)
            place = len(sizes) - count
            found.append(float(np.partition(sizes, place)[place]) if count else np.inf)
        return found


def _total(several: Sequence[Floats]) -> Floats:
    import numpy as np

    total = np.zeros(several[0].shape)
    for one in several:
        total += one
    return total


def _chances(seed: int, label: str, number: int, first: int, count: int) -> Floats:
    """Numbers of [0, 1) that belong to places, by splitmix64 of a key and the place."""
    import numpy as np

    digest = hashlib.sha256(f"{seed}\0{label}\0{number}".encode("utf-8", "surrogatepass")).digest()
    place = np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        state = place * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(digest[:8], "<u8")[0]
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(np.floor_divide(state ^ state >> np.uint64(31), 1 << 11) / 2.0**53, np.float64)
