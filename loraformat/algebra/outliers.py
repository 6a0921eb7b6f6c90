"""Outliers among the norms of one module kind: one definition for `inspect` and `validate`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from statistics import median
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# Modified z-score above which a value is an outlier, of logarithms, since norms spread by factors.
# Source: Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers".
LEAST_SCORE = 3.5
LEAST_GROUP = 5
# Of the logarithms, at the least: nearly equal norms would make every small deviation a large one. With it a norm is an
# outlier only from 2.4 times the median on.
_LEAST_SPREAD = 0.25
_SPREAD_OF_NORMAL = 1.4826  # standard deviation of a normal distribution, over its median absolute deviation


def outliers(norms: Iterable[tuple[Key, Hashable, float | None]]) -> Mapping[Key, float]:
    """The keys whose norms stand out, each with the median norm of its group.

    Args:
        norms: (key, group, norm); zero, unknown and infinite norms neither stand out nor count.
    """
    groups: dict[Hashable, dict[Key, float]] = {}
    for key, group, norm in norms:
        if norm and math.isfinite(norm):
            groups.setdefault(group, {})[key] = math.log(norm)
    found: dict[Key, float] = {}
    for members in groups.values():
        if len(members) < LEAST_GROUP:
            continue
        middle = median(members.values())
        spread = max(_SPREAD_OF_NORMAL * median(abs(value - middle) for value in members.values()), _LEAST_SPREAD)
        found |= {key: math.exp(middle) for key, value in members.items() if abs(value - middle) / spread > LEAST_SCORE}
    return found
