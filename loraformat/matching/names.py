"""Which stored tensor an update lands on, and how that tensor is stored. Pure: names, shapes and config.json only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraformat.matching.orientation import is_stored_transposed
from loraformat.matching.ties import Tie, ties_of
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import (
    Hadamard,
    Kronecker,
    LowRank,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)


@dataclass(frozen=True, slots=True)
class Landing:
    """Where the updates of one base weight land.

    Attributes:
        tensor: name in the checkpoint. For a tied weight that is not stored, the name that it will have once untied.
        is_stored: whether the checkpoint has `tensor`.
        transposed: whether the checkpoint stores it as (in, out), so that the update is transposed on the way.
        is_guess: whether `transposed` rests on the adapter's flag alone (a square weight of an unknown architecture).
    """

    tensor: str
    is_stored: bool = True
    transposed: bool = False
    is_guess: bool = False


@dataclass(frozen=True, slots=True)
class Misfit:
    """An update whose shape is not that of the stored tensor."""

    weight: str
    update_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matching:
    """All updates of one adapter against one base.

    Attributes:
        landings: base weight → where it lands, for all that do.
        unmatched: base weight → the nearest names of the base, for all that do not. A bias that the base lacks is in
            neither: IA3 and RoAd scale the biases of their layers where there are any.
        misfits: updates that land but do not fit.
        ties: groups of weights of the base that are one table.
    """

    landings: Mapping[str, Landing]
    unmatched: Mapping[str, tuple[str, ...]]
    misfits: tuple[Misfit, ...]
    ties: tuple[Tie, ...]


def match(adapter: Adapter, base: Checkpoint) -> Matching:
    """The stored tensor of every update of `adapter`. Raises nothing: rules must be able to describe what is wrong."""
    ties = ties_of(base, adapter.updates)
    rename = _one_prefix(adapter.updates, base, ties)
    landings: dict[str, Landing] = {}
    unmatched: dict[str, tuple[str, ...]] = {}
    misfits: list[Misfit] = []
    for weight, updates in adapter.updates.items():
        name = rename(weight)
        home = name if name in base.tensors else _tied_home(name, ties)
        if home is None and is_optional(updates):
            continue
        if home is None:
            unmatched[weight] = nearest(weight, base.tensors)
            continue
        stored = base.tensors[home].shape
        transposed, is_guess = is_stored_transposed(name, updates, stored, base.config, adapter.config.fan_in_fan_out)
        landings[weight] = Landing(name, name in base.tensors, transposed, is_guess)
        misfits.extend(_misfits(weight, updates, stored, transposed))
    return Matching(landings, unmatched, tuple(misfits), ties)


def is_optional(updates: tuple[Update, ...]) -> bool:
    """Whether a base may lack the weight of these updates: a bias that an adapted layer may or may not have."""
    return all(isinstance(update, (Scaled, Rotated)) and update.is_bias for update in updates)


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The names of `candidates` that look most like `name`, best first; those with the same last components first."""
    tail = ".".join(name.split(".")[-3:])
    same_tail = [candidate for candidate in candidates if candidate.endswith(tail)]
    if same_tail:
        return tuple(sorted(same_tail, key=lambda other: (_edits(name, other), other))[:count])
    kind = name.rpartition(".")[2]
    pool = [candidate for candidate in candidates if candidate.endswith(kind)][:5000]
    return tuple(difflib.get_close_matches(name, pool, n=count, cutoff=0.5))


def _edits(one: str, other: str) -> int:
    return abs(len(one) - len(other)) + sum(a != b for a, b in zip(reversed(one), reversed(other), strict=False))


class _Prefix:
    """Renames every weight by one prefix that is added or removed."""

    def __init__(self, added: str = "", removed: str = "") -> None:
        self.added, self.removed = added, removed

    def __call__(self, weight: str) -> str:
        return self.added + weight.removeprefix(self.removed)


def _one_prefix(updates: Mapping[str, tuple[Update, ...]], base: Checkpoint, ties: tuple[Tie, ...]) -> _Prefix:
    """The prefix that makes *all* names land, where the adapter was made on a bare or on a wrapped model.

    Only where no name lands as it stands, one prefix serves all of them, and it is the only one that does.
    """
    names = [name for name, chain in updates.items() if not is_optional(chain)]
    if not names or any(name in base.tensors or _tied_home(name, ties) for name in names):
        return _Prefix()
    first = names[0]
    candidates = [_Prefix(added=n[: -len(first)]) for n in base.tensors if n.endswith("." + first)]
    parts = first.split(".")
    for cut in range(1, len(parts) - 1):
        removed = ".".join(parts[:cut]) + "."
        if first.removeprefix(removed) in base.tensors:
            candidates.append(_Prefix(removed=removed))
    fitting = [
        prefix
        for prefix in candidates
        if all(name.startswith(prefix.removed) and prefix(name) in base.tensors for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else _Prefix()


def _tied_home(name: str, ties: tuple[Tie, ...]) -> str | None:
    """The stored tensor whose table `name` shares, or None."""
    return next((tie.stored for tie in ties if name in tie.names), None)


def _misfits(weight: str, updates: tuple[Update, ...], stored: tuple[int, ...], transposed: bool) -> Iterable[Misfit]:
    expected = stored[::-1] if transposed else stored
    for update in updates:
        if isinstance(update, Replace):
            if not _fits_replacement(update.shape, stored):
                yield Misfit(weight, update.shape, stored)
            expected = update.shape[::-1] if transposed else update.shape
        elif isinstance(update, Rows):
            if len(stored) != 2 or update.shape[1] != expected[1]:
                yield Misfit(weight, update.shape, stored)
        elif not _fits(update, expected):
            yield Misfit(weight, update.shape, stored)


def _fits(update: Update, expected: tuple[int, ...]) -> bool:
    if isinstance(update, LowRank) and (len(update.up.shape) != 2 or len(update.down.shape) != 2):
        return False
    if isinstance(update, LowRank) and update.up.shape[1] != update.down.shape[0]:
        return False
    if isinstance(update, LowRank) and update.magnitude is not None:
        count = expected[0] if update.magnitude.axis == 1 else expected[-1]
        if update.magnitude.vector.numel != count:
            return False
    if isinstance(update, (Scaled, Rotated, Multiplied)):
        return update.fits(expected)
    if isinstance(update, Hadamard) and not update.is_even:
        return False
    if isinstance(update, (Hadamard, Kronecker)) and len(expected) > 2:
        return update.shape == (expected[0], math.prod(expected[1:]))
    return update.shape == expected


def _fits_replacement(new: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Equal shapes, or a matrix with another number of rows (a resized vocabulary, another number of labels)."""
    return new == stored or (len(new) == 2 and len(stored) == 2 and new[1] == stored[1])
