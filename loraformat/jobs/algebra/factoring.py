"""From decompositions to low-rank updates, and what that cost, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraformat.algebra.decomposition import Decomposition, stored
from loraformat.errors import NonFiniteValue
from loraformat.model.results.factor_changes import FactorChange, FactorResult
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


@dataclass(frozen=True, slots=True)
class Form:
    """What a low-rank update is of, beside its factors.

    Attributes:
        kernel, is_embedding: as those of LowRank.
        is_stack: whether there is a matrix for each expert.
    """

    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    is_stack: bool = False

    @staticmethod
    def of(updates: Iterable[LowRank]) -> Form:
        """The form of the first update; that of a matrix where there is none."""
        first = next(iter(updates), None)
        return Form() if first is None else Form(first.kernel, first.is_embedding, first.is_stack)


def low_rank_of(
    weight: str, found: Sequence[Decomposition], rank: int, rank_before: int, form: Form, dtype: DType
) -> tuple[LowRank, FactorChange]:
    """The update of a rank with factors in a dtype and scale 1, and what it costs.

    Raises: NonFiniteValue (LF402): a factor is too large for the dtype.
    """
    import numpy as np

    lefts, rights, costs = [], [], []
    for each in found:
        exact = each.factors(rank)
        written, change = stored(exact, dtype)
        if not (np.isfinite(written.left).all() and np.isfinite(written.right).all()):
            raise NonFiniteValue(
                f"a factor is too large for {dtype.torch_name}", where=weight, hint="choose --dtype float32"
            )
        lefts.append(_padded(written.left, rank, 1))
        rights.append(_padded(written.right, rank, 0))
        costs.append(change)
    up, down = (np.stack(each) if form.is_stack else each[0] for each in (lefts, rights))
    update = LowRank(
        tensor_of(up, dtype), tensor_of(down, dtype), 1.0, kernel=form.kernel, is_embedding=form.is_embedding
    )
    return update, change_of(weight, found, rank, rank_before, costs)


def change_of(
    weight: str, found: Sequence[Decomposition], rank: int, rank_before: int, costs: Sequence[float]
) -> FactorChange:
    """The record of an update of which a rank was kept, at what further cost of rounding.

    What the rank leaves out is orthogonal to all that is kept, so squares add.
    """
    norm = math.hypot(*(each.norm for each in found))
    tail = math.hypot(*(each.tail(rank) for each in found))
    relative = tail / norm if norm else 0.0
    return FactorChange(
        weight=weight,
        rank_before=rank_before,
        rank=rank,
        norm=norm,
        spectral_norm=max((float(each.values[0]) for each in found if each.rank), default=0.0),
        error=math.hypot(relative, math.hypot(*costs) / norm) if norm else 0.0,
        optimum=relative,
        energy=max(0.0, 1.0 - relative * relative),
    )


def tensor_of(values: Floats, dtype: DType) -> LazyTensor:
    """Values, rounded once to a dtype."""
    return LazyTensor.of(rounded(values, dtype), dtype)


def _padded(factor: Floats, rank: int, axis: int) -> Floats:
    """A factor of an expert of lower rank, filled up with zeros."""
    import numpy as np

    missing = rank - factor.shape[axis]
    return factor if not missing else np.pad(factor, [(0, missing if at == axis else 0) for at in range(2)])


def together(result: FactorResult) -> FactorResult:
    """The result with the figures of all its updates together."""
    weights = result.weights
    norm = math.hypot(*(each.norm for each in weights))
    return replace(
        result,
        norm=norm,
        error=_share([each.error * each.norm for each in weights], norm) or 0.0,
        optimum=_share([_times(each.optimum, each.norm) for each in weights], norm),
        cross_terms=_share([_times(each.cross_terms, each.norm) for each in weights], norm),
        energy=_energy(weights, norm),
    )


def _energy(weights: Sequence[FactorChange], norm: float) -> float | None:
    known = [(each.energy, each.norm) for each in weights if each.energy is not None]
    if len(known) < len(weights) or not norm:
        return None
    return math.fsum(energy * (own / norm) ** 2 for energy, own in known)


def _times(share: float | None, norm: float) -> float | None:
    return None if share is None else share * norm


def _share(parts: Sequence[float | None], norm: float) -> float | None:
    known = [part for part in parts if part is not None]
    return math.hypot(*known) / norm if norm and len(known) == len(parts) else None
