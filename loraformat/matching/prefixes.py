"""One change of prefix that gives all weights of an adapter the names of a base: moved parts of composed models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.matching.names import is_optional, match
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import Update

_MOST_CANDIDATES = 10_000


@dataclass(frozen=True, slots=True)
class Change:
    """Names that begin with `before` begin with `after` instead."""

    before: str
    after: str

    def __call__(self, weight: str) -> str:
        """The new name."""
        return self.after + weight.removeprefix(self.before)


def prefix_change(adapter: Adapter, base: Checkpoint) -> Change | None:
    """The change that makes every update land where none does, if it is the only one; else None.

    The names after the change are those of the checkpoint.
    """
    names = [name for name, chain in adapter.updates.items() if not is_optional(chain)]
    landings = match(adapter, base).landings
    if not names or any(name in landings and not landings[name][0].is_prefixed for name in names):
        return None
    stored = [name for name in base.tensors if _tail(name, 3) == _tail(names[0], 3)][:_MOST_CANDIDATES]
    changes = {change for name in stored if (change := _change(names[0], name)) is not None}
    fitting = [change for change in changes if _fits(change, names, base)]
    return fitting[0] if len(fitting) == 1 else None


def renamed(adapter: Adapter, change: Change) -> Mapping[str, tuple[Update, ...]]:
    """The updates under their new names, sorted."""
    return dict(sorted((change(name), chain) for name, chain in adapter.updates.items()))


def _tail(name: str, count: int) -> list[str]:
    return name.split(".")[-count:]


def _change(name: str, stored: str) -> Change | None:
    """What differs in front of the longest common end, cut at dots."""
    ours, theirs = name.split("."), stored.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    before, after = ours[: len(ours) - common], theirs[: len(theirs) - common]
    if any(part.isdigit() for part in (*before, *after)):
        return None
    return Change(_path(before), _path(after))


def _path(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _fits(change: Change, names: list[str], base: Checkpoint) -> bool:
    return all(name.startswith(change.before) and change(name) in base.tensors for name in names)
