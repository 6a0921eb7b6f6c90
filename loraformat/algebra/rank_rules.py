"""How many singular values of each update to keep: by rank, energy, error, size, or one of kohya's three rules."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from loraformat.algebra.decomposition import Decomposition
from loraformat.model.results.factor_changes import NOISE_MARGIN

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRule:
    """The least rank that meets every bound which is not None; `max_rank` then limits it.

    Attributes:
        rank: so many singular values.
        energy: Σ kept σ² ≥ energy · ‖ΔW‖².
        error: ‖ΔW − kept‖ ≤ error · ‖ΔW‖.
        sv_ratio: all σ ≥ σ₁ / sv_ratio.
        sv_cumulative: Σ kept σ ≥ sv_cumulative · Σσ.
        sv_fro: √(Σ kept σ²) ≥ sv_fro · ‖ΔW‖.
        size: most bytes of all factors of an adapter together; not beside another bound.
        max_rank: the largest rank of any update.
        floor: the Frobenius norm that rounding of its sources is expected to have in the matrix. A bound by energy or
            error is met where about that is left out: a larger rank would store rounding.

    sv_ratio, sv_cumulative and sv_fro are those of kohya-ss/sd-scripts, networks/resize_lora.py, which kept one value
    more than the bound needs until its pull request 2194.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    size: int | None = None
    max_rank: int | None = None
    floor: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The bounds that are given, without `max_rank`."""
        every = ("rank", "energy", "error", "sv_ratio", "sv_cumulative", "sv_fro", "size")
        return tuple(name for name in every if getattr(self, name) is not None)

    @property
    def most(self) -> int | None:
        """The largest rank that it can give; None where the singular values decide."""
        return self.rank if self.max_rank is None and self.names == ("rank",) else self.max_rank

    def least(self, found: Decomposition) -> int:
        """The rank of one update by all rules but the size; never more than there are singular values.

        >>> import numpy as np
        >>> found = Decomposition(np.eye(3), np.array([4.0, 2.0, 1.0]), np.eye(3))
        >>> RankRule(energy=0.9).least(found), RankRule(sv_ratio=2).least(found), RankRule(max_rank=1).least(found)
        (2, 2, 1)
        """
        if not found.rank:
            return 0
        wanted = [min(self.rank, found.rank)] if self.rank is not None else []
        wanted += [min(each, self._first_below_floor(found)) for each in self._by_squares(found)]
        if self.sv_ratio is not None:
            wanted.append(max(1, int((found.values >= found.values[0] / self.sv_ratio).sum())))
        if self.sv_cumulative is not None:
            sums = found.values.cumsum()
            wanted.append(_first(sums / sums[-1], self.sv_cumulative))
        return min(max(wanted, default=found.rank), self.max_rank or found.rank)

    def _by_squares(self, found: Decomposition) -> Iterator[int]:
        """The ranks that the bounds of energy and error ask for."""
        shares = _shares(found.values, found.residual)
        if self.energy is not None:
            yield _first(shares, self.energy)
        if self.sv_fro is not None:
            yield _first(shares, self.sv_fro * self.sv_fro)
        if self.error is not None:
            most = self.error * found.norm
            yield next((k for k in range(1, found.rank) if found.tail(k) <= most), found.rank)

    def _first_below_floor(self, found: Decomposition) -> int:
        """The least rank that leaves out no more than the floor; all that there are where no rank does."""
        if not self.floor:
            return found.rank
        return next((k for k in range(1, found.rank) if found.tail(k) <= self.floor * NOISE_MARGIN), found.rank)

    def holds_within(self, found: Decomposition) -> bool:
        """Whether the leading values of an incomplete decomposition are enough to know the rank: the rest is smaller.

        `sv_cumulative` needs all of them.
        """
        if not found.residual:
            return True
        if self.max_rank is not None and found.rank >= self.max_rank:
            return True
        if self.sv_cumulative is not None:
            return False
        needs = [self.rank is None or found.rank >= self.rank]
        is_noise = found.residual <= self.floor * NOISE_MARGIN
        if self.energy is not None or self.sv_fro is not None:
            share = max(self.energy or 0.0, (self.sv_fro or 0.0) ** 2)
            needs.append(is_noise or bool(_shares(found.values, found.residual)[-1] >= share))
        if self.error is not None:
            needs.append(is_noise or found.residual <= self.error * found.norm)
        if self.sv_ratio is not None:
            needs.append(bool(found.values[-1] < found.values[0] / self.sv_ratio))
        return all(needs)


def _shares(values: Floats, residual: float) -> Floats:
    """The share of all squares that the first k values hold, for k from 1 on."""
    import numpy as np

    scale = values[0]
    squares = np.cumsum((values / scale) ** 2)
    shares: Floats = squares / (squares[-1] + (residual / scale) ** 2)
    return shares


def _first(shares: Floats, least: float) -> int:
    """The first place, from 1, whose share is enough; the last where none is."""
    found = (shares >= least).nonzero()[0]
    return int(found[0]) + 1 if len(found) else len(shares)


def ranks_of(
    rule: RankRule, updates: Mapping[Key, Sequence[Decomposition]], nbytes: Mapping[Key, int]
) -> dict[Key, int]:
    """The rank of each update by all rules; 0 for one that is zero, and for one that a size leaves no room for.

    Args:
        updates: one decomposition each, or one for each expert of a stack, which then share the largest rank.
        nbytes: what one more rank of an update takes.
    """
    ranks = {key: max((rule.least(each) for each in several), default=0) for key, several in updates.items()}
    return ranks if rule.size is None else _within(rule.size, ranks, updates, nbytes)


def _within(
    size: int, most: Mapping[Key, int], updates: Mapping[Key, Sequence[Decomposition]], nbytes: Mapping[Key, int]
) -> dict[Key, int]:
    """The ranks that keep most of Σ‖ΔW‖² in a number of bytes: singular values by σ² / bytes until there is no room.

    An update whose next value does not fit gets no later one, since those take as much and hold less.
    """
    steps = []
    for number, (key, several) in enumerate(updates.items()):
        for at in range(max((each.rank for each in several), default=0)):
            held = math.fsum(float(each.values[at]) ** 2 for each in several if at < each.rank)
            steps.append((-held / nbytes[key], at, number, key))
    found = dict.fromkeys(updates, 0)
    left = size
    for _, at, _, key in sorted(steps, key=lambda step: step[:3]):
        if found[key] == at < most[key] and nbytes[key] <= left:
            found[key] += 1
            left -= nbytes[key]
    return found
