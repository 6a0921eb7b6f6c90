"""The updates of one weight in two adapters, compared by their factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from loraformat.model.floats import float64_of, quietly
from loraformat.model.results.differences import UNKNOWN_SCALE, WeightDifference
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Replace, Update, kind_of, scale_of, settings, tensors

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def update_difference(
    weight: str, before: Sequence[Update], after: Sequence[Update], tolerance: float = 0.0
) -> Iterator[WeightDifference]:
    """A difference for each pair of updates, in the order of application.

    Updates that add are compared by what they add, without forming it: equal products of other factors are equal within
    rounding. DoRA's magnitudes, and kinds that replace or multiply, are compared by their tensors.
    """
    for one, other in zip_longest(before, after):
        if one is None or other is None:
            lone = one if one is not None else other
            assert lone is not None
            arrow = f"{kind_of(one).name if one else 'none'} -> {kind_of(other).name if other else 'none'}"
            yield _incomparable(weight, arrow, lone, lone, "one adapter has more updates of it")
        else:
            yield _pair(weight, one, other, tolerance)


def _pair(weight: str, one: Update, other: Update, tolerance: float) -> WeightDifference:
    from loraformat.algebra import is_additive

    names = kind_of(one).name, kind_of(other).name
    kind = names[0] if names[0] == names[1] else " -> ".join(names)
    if is_additive(one) and is_additive(other):
        return _additive(weight, kind, one, other, tolerance)
    if type(one) is not type(other) or _settings(one) != _settings(other):
        return _incomparable(weight, kind, one, other, "they are of different kinds, settings or rows")
    return _by_tensors(weight, kind, one, other, tolerance)


def _additive(weight: str, kind: str, one: Update, other: Update, tolerance: float) -> WeightDifference:
    from loraformat.algebra import cosine, distance, frobenius, overlap

    if not _has_known_scale(one) or not _has_known_scale(other):
        return _incomparable(weight, kind, one, other, UNKNOWN_SCALE)
    norm, norm_after, apart = frobenius(one), frobenius(other), distance(one, other)
    if apart is None:
        return _incomparable(weight, kind, one, other, "their shapes differ, or their factors do not fit")
    magnitude = _magnitude_apart(one, other)
    if magnitude is None:
        return _incomparable(weight, kind, one, other, "only one is DoRA, or their magnitudes are along different axes")
    if _same(one, other):
        apart = 0.0
    found = overlap(one, other) if apart else None
    is_equal = apart <= tolerance * (norm or 0.0) and magnitude <= tolerance
    return WeightDifference(
        weight=weight,
        status="equal" if is_equal else "changed",
        kind=kind,
        shape=one.shape,
        shape_after=other.shape,
        norm=norm,
        norm_after=norm_after,
        distance=apart,
        relative=_ratio(apart, norm),
        cosine=1.0 if apart == 0 and norm else cosine(one, other),
        overlap_outputs=None if found is None else found.outputs,
        overlap_inputs=None if found is None else found.inputs,
        overlap_dimensions=None if found is None else found.dimensions,
    )


def _has_known_scale(update: Update) -> bool:
    """Whether a kind that has a scale states it."""
    return not kind_of(update).has_scale or scale_of(update) is not None


def _incomparable(weight: str, kind: str, one: Update, other: Update, reason: str) -> WeightDifference:
    return WeightDifference(
        weight=weight, status="incomparable", reason=reason, kind=kind, shape=one.shape, shape_after=other.shape
    )


@quietly
def _magnitude_apart(one: Update, other: Update) -> float | None:
    """‖m' - m‖ / ‖m‖ of DoRA's magnitudes; 0 where there are none, None where one of them has none."""
    vectors = [update.magnitude if isinstance(update, LowRank) else None for update in (one, other)]
    first, second = vectors
    if first is None and second is None:
        return 0.0
    if first is None or second is None or first.vector.numel != second.vector.numel or first.axis != second.axis:
        return None
    before, after = _flat(first.vector), _flat(second.vector)
    norm, apart = _length(before), _length(after - before)
    return apart / norm if norm else (math.inf if apart else 0.0)


@quietly
def _by_tensors(weight: str, kind: str, one: Update, other: Update, tolerance: float) -> WeightDifference:
    import numpy as np

    pairs = list(zip(tensors(one), tensors(other), strict=False))
    is_resized = isinstance(one, Replace) and one.shape != other.shape and one.shape[1:] == other.shape[1:]
    is_alike = [role for role, _ in tensors(one)] == [role for role, _ in tensors(other)]
    if not is_alike or not (is_resized or all(left.shape == right.shape for (_, left), (_, right) in pairs)):
        return _incomparable(weight, kind, one, other, "their shapes differ")
    before, after = (
        np.concatenate([_flat(_first_rows(pair[side][1], pair)) for pair in pairs]) if pairs else np.zeros(0)
        for side in (0, 1)
    )
    norm, norm_after, apart = _length(before), _length(after), _length(after - before)
    is_equal = apart <= tolerance * norm and not is_resized
    return WeightDifference(
        weight=weight,
        status="resized" if is_resized else "equal" if is_equal else "changed",
        kind=kind,
        shape=one.shape,
        shape_after=other.shape,
        norm=norm,
        norm_after=norm_after,
        distance=apart,
        relative=_ratio(apart, norm),
        cosine=float(before @ after) / (norm * norm_after) if norm and norm_after else None,
    )


def _settings(update: Update) -> dict[str, object]:
    return {name: value for name, value in settings(update).items() if name != "follows_tie"}


def _first_rows(tensor: LazyTensor, pair: tuple[tuple[str, LazyTensor], tuple[str, LazyTensor]]) -> LazyTensor:
    """The rows that both tensors of a pair have."""
    shapes = [each.shape for _, each in pair]
    return tensor if shapes[0] == shapes[1] else tensor.rows(0, min(shape[0] for shape in shapes))


def _same(one: Update, other: Update) -> bool:
    """Whether two updates hold the same values."""
    if type(one) is not type(other) or scale_of(one) != scale_of(other):
        return False
    mine, theirs = list(tensors(one)), list(tensors(other))
    return len(mine) == len(theirs) and all(
        role == name and left.shape == right.shape and bool((_flat(left) == _flat(right)).all())
        for (role, left), (name, right) in zip(mine, theirs, strict=True)
    )


def _ratio(apart: float | None, norm: float | None) -> float | None:
    return apart / norm if apart is not None and norm else None


def _flat(tensor: LazyTensor) -> Floats:
    return float64_of(tensor).reshape(-1)


def _length(vector: Floats) -> float:
    import numpy as np

    return float(np.linalg.norm(vector))
