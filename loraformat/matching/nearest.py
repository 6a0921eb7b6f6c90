"""The names of a base most similar to a missing one, in time linear in the number of names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST_TAIL = 8  # components: the layer is among them, and what is above it hardly ever tells two names apart
_SHORTEST_TAIL = 3
_MOST_ALIKE = 32  # candidates that are compared with one name, by characters
_MOST_CHARACTERS = 200
_LEAST_RATIO = 0.5


class Nearest:
    """Candidates by their last components: built once, then a look for each name.

    Args:
        candidates: the first of those that share a tail count where many do.
    """

    def __init__(self, candidates: Iterable[str]) -> None:
        self._by_tail: dict[str, list[str]] = {}
        self._by_kind: dict[tuple[str, ...], list[str]] = {}
        for name in candidates:
            parts = name.rsplit(".", _LONGEST_TAIL)
            for tail in {".".join(parts[start:]) for start in range(len(parts))}:
                _keep(self._by_tail.setdefault(tail, []), name)
            kind = parts[-1]
            for key in ((kind,), (kind, *_numbers(name))):
                _keep(self._by_kind.setdefault(key, []), name)

    def of(self, name: str, count: int = 3) -> tuple[str, ...]:
        """The names that look most like `name`, best first; those with the most last components in common first."""
        parts = name.rsplit(".", _LONGEST_TAIL)
        found: dict[str, None] = {}
        for start in range(max(1, len(parts) - _SHORTEST_TAIL + 1)):
            alike = self._by_tail.get(".".join(parts[start:]), [])
            found.update(dict.fromkeys(sorted(alike, key=lambda other: (_edits(name, other), other))))
            if len(found) >= count:
                break
        if found:
            return tuple(found)[:count]
        from difflib import get_close_matches

        kind = parts[-1]
        pool = self._by_kind.get((kind, *_numbers(name))) or self._by_kind.get((kind,), [])
        close = {other[-_MOST_CHARACTERS:]: other for other in pool}
        best = get_close_matches(name[-_MOST_CHARACTERS:], close, n=count, cutoff=_LEAST_RATIO)
        return tuple(close[text] for text in best)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The names of `candidates` that look most like `name`, for one that is asked for once."""
    names = list(candidates)
    ending = [other for other in names if other.endswith(name)]
    return Nearest(ending or names).of(name, count) or tuple(ending[:count])


def is_namesake(name: str, other: str) -> bool:
    """Whether two names may be of one weight: the same module and parameter at the end, the same numbers before."""
    ends = [each.rsplit(".", 2)[-2:] for each in (name, other)]
    return ends[0] == ends[1] and _numbers(name) == _numbers(other)


def _keep(names: list[str], name: str) -> None:
    if len(names) < _MOST_ALIKE:
        names.append(name)


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name[-_MOST_CHARACTERS:])


def _edits(one: str, other: str) -> int:
    one, other = one[-_MOST_CHARACTERS:], other[-_MOST_CHARACTERS:]
    return abs(len(one) - len(other)) + sum(a != b for a, b in zip(reversed(one), reversed(other), strict=False))
