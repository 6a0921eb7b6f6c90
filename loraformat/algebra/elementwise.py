"""Methods that combine several changes of one weight value by value, by rows: TIES, DARE and their relatives.

Every value of a change is one chain of multiply-adds of its factors (`arithmetic.product`), every threshold is exact
and every random number belongs to its place, so the result does not depend on the blocks in which it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraformat.algebra.counted_random import key_of, uniform
from loraformat.algebra.factors import Matrix, Product
from loraformat.algebra.row_blocks import HEIGHT, block_at, places
from loraformat.arithmetic import Packed, fold, pack, product

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

TRIMMED = ("ties", "magnitude", "breadcrumbs")
RANDOM = ("dare", "dare-ties", "della")
VOTING = ("ties", "dare-ties", "della")
_DIGITS = 16  # bits of a magnitude that one pass sorts by


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """How much of each change stays, and who decides about signs.

    Attributes:
        method: one of TRIMMED and RANDOM.
        density: share of the values of each change that stay.
        sign: "total": the sign of the sum of what stays; "frequency": the sign that most values have.
            Zero has the positive sign.
        gamma: of breadcrumbs, the share of the largest values that goes; less where density leaves no room for it.
        epsilon: of della, how far the probability of a value may be from the density.
        seed: of the random methods.
    """

    method: str
    density: float = 1.0
    sign: str = "total"
    gamma: float = 0.01
    epsilon: float = 0.1
    seed: int = 0


@dataclass(slots=True)
class SignCounts:
    """Places where any of the changes is left, and where two of them have opposite signs."""

    there: int = 0
    opposed: int = 0


@dataclass(frozen=True, slots=True)
class _Threshold:
    """The largest `count` magnitudes of a matrix: all above `least`, and of those equal to it the first `equal`.

    Attributes:
        before: how many are equal to it above each block of rows, and at last in all.
    """

    least: int
    equal: int
    before: tuple[int, ...]

    @property
    def is_clear(self) -> bool:
        """Whether all that are equal to it stay, so that the places of others do not matter."""
        return self.equal == self.before[-1]

    def mask(self, bits: NDArray[np.uint64], before: int) -> NDArray[np.bool_]:
        """Which stay of some rows above which `before` magnitudes are equal to the least."""
        import numpy as np

        if self.is_clear:
            return np.asarray(bits >= np.uint64(self.least))
        is_equal = bits == np.uint64(self.least)
        order = np.cumsum(is_equal.reshape(-1)).reshape(bits.shape) + before
        found: NDArray[np.bool_] = (bits > np.uint64(self.least)) | (is_equal & (order <= self.equal))
        return found


@dataclass(frozen=True, slots=True)
class Lines:
    """A matrix whose rows are computed when they are asked for: `rows(start, stop)` gives any of them, in float64."""

    rows: Callable[[int, int], Floats]
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Change:
    """One change: rows of it, and which of its values stay."""

    matrix: Packed | Floats | Lines
    shape: tuple[int, int]
    kept: _Threshold | None = None
    dropped: _Threshold | None = None
    key: int = 0

    def rows(self, start: int, stop: int) -> Floats:
        if isinstance(self.matrix, Lines):
            return self.matrix.rows(start, stop)
        return product(self.matrix, start, stop) if isinstance(self.matrix, Packed) else self.matrix[start:stop]

    def mask(self, threshold: _Threshold, bits: NDArray[np.uint64], start: int) -> NDArray[np.bool_]:
        """Which of the rows from `start` on are among the largest."""
        import numpy as np

        before = 0
        if not threshold.is_clear:
            first = start // HEIGHT * HEIGHT
            before = threshold.before[block_at(first)]
            if first < start:
                before += int((_bits(self.rows(first, start)) == np.uint64(threshold.least)).sum())
        return threshold.mask(bits, before)


@dataclass(frozen=True, slots=True)
class Combined:
    """Σ weight · change with a method applied, by blocks of rows: a `RowBlocks`."""

    changes: tuple[_Change, ...]
    weights: tuple[float, ...]
    sparsity: Sparsity
    shape: tuple[int, int]
    tally: SignCounts = field(default_factory=SignCounts)

    def block(self, start: int, stop: int) -> Floats:
        """Rows `start:stop`; the tally counts them."""
        stacked = self._stacked(start, stop)
        self._count(stacked)
        return self._of(stacked)

    def rows(self, start: int, stop: int) -> Floats:
        """Rows `start:stop`, any of them; not counted."""
        return self._of(self._stacked(start, stop))

    def _stacked(self, start: int, stop: int) -> Floats:
        import numpy as np

        return np.stack([_sparse(change, start, stop, self.sparsity) for change in self.changes])

    def _of(self, stacked: Floats) -> Floats:
        import numpy as np

        weights = np.array(self.weights)[:, None, None]
        if self.sparsity.method not in VOTING:
            return fold(stacked * weights, 0)
        votes = stacked if self.sparsity.sign == "total" else np.sign(stacked)
        agrees = np.sign(stacked) == np.where(fold(votes, 0) >= 0, 1.0, -1.0)
        return np.asarray(fold(stacked * weights * agrees, 0) / np.maximum(agrees.sum(axis=0), 1), np.float64)

    def _count(self, stacked: Floats) -> None:
        is_above, is_below = (stacked > 0).any(axis=0), (stacked < 0).any(axis=0)
        self.tally.there += int((is_above | is_below).sum())
        self.tally.opposed += int((is_above & is_below).sum())


def combined(terms: Sequence[Matrix | Lines], weights: Sequence[float], sparsity: Sparsity, name: str) -> Combined:
    """The combination of several changes of one weight.

    Methods, for x what stays of each change and w its weight:

    - magnitude: Σ w x of the density · numel largest magnitudes.
    - ties: Σ w x over the x whose sign is the elected one, by how many those are; x as for magnitude (PEFT's `ties`;
      Yadav et al. 2023). Weights do not vote.
    - breadcrumbs: Σ w x without the gamma · numel largest either (Davari and Belilovsky 2023).
    - dare: Σ w x, each value kept with the probability density and divided by it (Yu et al. 2023).
    - dare-ties: as ties, with x as for dare.
    - della: as ties; a value is kept with the probability density − ε + 2ε · rank / (cols − 1) of its magnitude within
      its row, and divided by it (Deep et al. 2024).

    >>> import numpy as np
    >>> changes = [np.array([[4.0, -1.0]]), np.array([[-2.0, -3.0]])]
    >>> combined(changes, [1.0, 1.0], Sparsity(method="ties"), "w").block(0, 1)
    array([[ 4., -2.]])

    Args:
        terms: of one shape.
        name: of the weight; random numbers depend on it, on the place among the terms and on the seed.
    """
    changes = []
    for number, term in enumerate(terms):
        matrix = pack(term.left, term.right) if isinstance(term, Product) else term
        change = _Change(matrix, (term.shape[0], term.shape[1]), key=key_of(sparsity.seed, name, number))
        changes.append(_trimmed(change, sparsity) if sparsity.method in TRIMMED else change)
    return Combined(tuple(changes), tuple(weights), sparsity, changes[0].shape)


def _trimmed(change: _Change, sparsity: Sparsity) -> _Change:
    numel = change.shape[0] * change.shape[1]
    if sparsity.method != "breadcrumbs" and sparsity.density >= 1:
        return change
    kept = int(min(sparsity.density, 1.0) * numel)
    if sparsity.method != "breadcrumbs":
        return _Change(change.matrix, change.shape, _threshold(change, kept))
    # Where both shares are more than all, the largest give way: mergekit 0.1.5, sparsify.py `magnitude_outliers`.
    dropped = min(int(sparsity.gamma * numel), numel - kept)
    return _Change(change.matrix, change.shape, _threshold(change, kept + dropped), _threshold(change, dropped))


def _sparse(change: _Change, start: int, stop: int, sparsity: Sparsity) -> Floats:
    """What stays of some rows of a change."""
    import numpy as np

    values = change.rows(start, stop)
    if sparsity.method in RANDOM:
        cols = change.shape[1]
        chances = uniform(change.key, start * cols, stop * cols).reshape(values.shape)
        shares = _probabilities(values, sparsity)
        return np.asarray(np.where(chances < shares, values / shares, 0.0), np.float64)
    if change.kept is None:
        return values
    bits = _bits(values)
    mask = change.mask(change.kept, bits, start)
    if change.dropped is not None:
        mask &= ~change.mask(change.dropped, bits, start)
    return np.asarray(np.where(mask, values, 0.0), np.float64)


def _probabilities(values: Floats, sparsity: Sparsity) -> Floats:
    import numpy as np

    if sparsity.method != "della":
        return np.asarray(min(sparsity.density, 1.0), np.float64)
    cols = values.shape[1]
    places_ = np.argsort(np.argsort(np.abs(values), axis=1, kind="stable"), axis=1, kind="stable")
    spread = 2 * sparsity.epsilon * places_ / max(1, cols - 1)
    return np.asarray(np.minimum(sparsity.density - sparsity.epsilon + spread, 1.0), np.float64)


def _bits(values: Floats) -> NDArray[np.uint64]:
    """Magnitudes as integers in the same order (IEEE 754)."""
    import numpy as np

    found: NDArray[np.uint64] = np.ascontiguousarray(np.abs(values)).view(np.uint64)
    return found


def _threshold(change: _Change, count: int) -> _Threshold:
    """The largest `count` magnitudes, by four passes that each settle 16 bits of the least of them."""
    import numpy as np

    rows, _ = change.shape
    if count <= 0:
        return _Threshold(2**64 - 1, 0, (0,) * (len(list(places(rows))) + 1))
    prefix, left = 0, count
    for shift in (48, 32, 16, 0):
        counts: NDArray[Any] = np.zeros(1 << _DIGITS, np.int64)
        for start, stop in places(rows):
            bits = _bits(change.rows(start, stop)).reshape(-1)
            if shift < 64 - _DIGITS:
                bits = bits[bits >> np.uint64(shift + _DIGITS) == np.uint64(prefix)]
            digits = (bits >> np.uint64(shift)) & np.uint64((1 << _DIGITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGITS)
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        prefix = prefix << _DIGITS | ((1 << _DIGITS) - 1 - place)
    before, total = [], 0
    for start, stop in places(rows):
        before.append(total)
        total += int((_bits(change.rows(start, stop)) == np.uint64(prefix)).sum())
    return _Threshold(prefix, left, (*before, total))
