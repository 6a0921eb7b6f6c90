"""Which stored tensor an update lands on, and how that tensor is stored. Pure: names, shapes and config.json only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from loraformat.matching.layers import replicated
from loraformat.matching.nearest import Nearest
from loraformat.matching.orientation import is_stack_transposed, is_stored_transposed
from loraformat.matching.rows import WHOLE, RowMap, StoredRows, StoredWeight, place_of_older_name, places_of
from loraformat.matching.tasks import with_task_head
from loraformat.matching.ties import Tie, ties_of
from loraformat.model.adapter import Adapter, module_of
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.patterns.keys import ends_of
from loraformat.model.updates import LowRank, Replace, Rotated, Scaled, Update
from loraformat.naming import spelling_of, tied_names


@dataclass(frozen=True, slots=True)
class Landing:
    """One tensor that the updates of one base weight land on.

    Attributes:
        tensor: name in the checkpoint. For a tied weight that is not stored, the name that it will have once untied.
        is_stored: whether the checkpoint has `tensor`.
        transposed: whether the checkpoint stores it as (in, out), so that the update is transposed on the way.
        is_guess: whether `transposed` rests on the adapter's flag alone (a square weight of an unknown architecture).
        part: which part of the update the tensor takes, and where.
        is_prefixed: whether the name was found only with a prefix more, less, or exchanged.
    """

    tensor: str
    is_stored: bool = True
    transposed: bool = False
    is_guess: bool = False
    part: RowMap = WHOLE
    is_prefixed: bool = False


@dataclass(frozen=True, slots=True)
class Misfit:
    """An update whose shape is not that of the stored tensor."""

    weight: str
    update_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]

    @property
    def is_grouped(self) -> bool:
        """Whether the weight is a convolution's in groups, of which the update has the inputs of all together."""
        (rows, cols, *kernel), (height, width, *size) = _conv(self.update_shape), _conv(self.stored_shape)
        return (rows, kernel) == (height, size) != (rows, []) and width > 0 and cols > width and cols % width == 0


def _conv(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) > 2 else (0, 0)


@dataclass(frozen=True, slots=True)
class Matching:
    """All updates of one adapter against one base.

    Attributes:
        landings: base weight → the tensors that it lands on, for all that do; several where it is stored in parts.
        unmatched: base weight → the nearest names of the base, for all that do not; () beyond the first 200. A bias
            that the base lacks is in neither: IA3 and RoAd scale the biases of their layers where there are any.
        misfits: updates that land but do not fit.
        ties: groups of weights of the base that are one table.
    """

    landings: Mapping[str, tuple[Landing, ...]]
    unmatched: Mapping[str, tuple[str, ...]]
    misfits: tuple[Misfit, ...]
    ties: tuple[Tie, ...]


# Nobody reads more suggestions, and no rule reports more names than that.
_MOST_SUGGESTED = 200


def match(adapter: Adapter, base: Checkpoint) -> Matching:
    """The stored tensors of every update of `adapter`. Raises nothing: rules must be able to describe what is wrong.

    A weight lands on the tensor of that very name; else where transformers would load the weight of that name from;
    else, where no name lands, on what one prefix more or less for all of them gives, or in a base whose class nobody
    knows one prefix in the place of another, where shapes fit and no second home does.
    """
    base = with_task_head(replicated(base, adapter.config.layers), adapter)
    ties = ties_of(base, adapter.updates)
    atlas = _Atlas(base, ties)
    rename = _one_prefix(adapter.updates, base, atlas)
    landings: dict[str, tuple[Landing, ...]] = {}
    unmatched: dict[str, tuple[str, ...]] = {}
    misfits: list[Misfit] = []
    near: Nearest | None = None
    for weight, updates in adapter.updates.items():
        name = rename(weight)
        place = atlas.find(name)
        if place is None and is_optional(updates):
            continue
        if place is None:
            near = near or Nearest(base.tensors)
            unmatched[weight] = near.of(weight) if len(unmatched) < _MOST_SUGGESTED else ()
            continue
        if len(place.shape) == 3 and any(isinstance(u, LowRank) and not u.kernel for u in updates):
            transposed, is_guess = is_stack_transposed(updates, place.shape, base.config, adapter.config), False
        else:
            transposed, is_guess = is_stored_transposed(
                name, updates, place.shape, base.config, adapter.config.claims_transposed(module_of(weight))
            )
        transposed = transposed or place.is_transposed
        landings[weight] = tuple(
            Landing(piece.tensor, piece.tensor in base.tensors, transposed, is_guess, piece.part, name != weight)
            for piece in place.pieces
        )
        followed = _followed(name, adapter, atlas)
        misfits.extend(_misfits(weight, updates, place, transposed, followed))
    return Matching(landings, unmatched, tuple(misfits), ties)


def is_optional(updates: tuple[Update, ...]) -> bool:
    """Whether a base may lack the weight of these updates: a bias that an adapted layer may or may not have."""
    return all(isinstance(update, (Scaled, Rotated)) and update.is_bias for update in updates)


class _Atlas:
    """Where names lie: looked up by exact name first, and the names in memory worked out when one is asked for."""

    def __init__(self, base: Checkpoint, ties: tuple[Tie, ...]) -> None:
        self._base, self._ties = base, ties
        self._tie_of = {name: tie for tie in reversed(ties) for name in tie.names}
        self._spelling = spelling_of(base.config)

    @cached_property
    def places(self) -> Mapping[str, StoredWeight]:
        """Names in memory."""
        return places_of(self._base)

    def find(self, name: str) -> StoredWeight | None:
        stored = self._base.tensors.get(name)
        if stored is not None:
            return StoredWeight(stored.shape, (StoredRows(name),))
        tie = self._tie_of.get(name)
        if tie is not None:
            return StoredWeight(self._base.tensors[tie.stored].shape, (StoredRows(name),))
        module, _, parameter = name.rpartition(".")
        wrapped = f"{module}.base_layer.{parameter}"  # in a base that was saved with adapters in it
        if wrapped in self._base.tensors:
            return StoredWeight(self._base.tensors[wrapped].shape, (StoredRows(wrapped),))
        if not self._spelling.rules:
            return None
        place = self.places.get(name) or place_of_older_name(name, self._spelling, self.places)
        return place or self._tied_head(name) or self._beside_bare_model(name)

    def partners_of(self, name: str) -> Iterable[str]:
        """The other names of the table that a weight is tied to."""
        tie = self._tie_of.get(name)
        return () if tie is None else (other for other in tie.names if other != name)

    def _beside_bare_model(self, name: str) -> StoredWeight | None:
        """A weight of a head whose stored name is renamed to one inside the bare model: the class has it outside.

        Source: transformers 5.23.0, core_model_loading.py `rename_source_key`, which then takes the prefix off.
        """
        prefix = self._spelling.prefix
        return self.places.get(f"{prefix}.{name}") if prefix else None

    def _tied_head(self, name: str) -> StoredWeight | None:
        """A head that is not stored, and that checkpoints call by a longer name than the model in memory does."""
        for tie, longer in self._longer_names.get(name, ()):
            if longer is not None and longer not in self._base.tensors:
                return StoredWeight(self._base.tensors[tie.stored].shape, (StoredRows(longer),))
        return None

    @cached_property
    def _longer_names(self) -> Mapping[str, list[tuple[Tie, str | None]]]:
        """End of a tied name → the ties that have names ending so, with the name where it is the only one."""
        found: dict[str, list[tuple[Tie, str | None]]] = {}
        for tie in self._ties:
            ends: dict[str, str | None] = {}
            for name in tie.names:
                for end in islice(ends_of(name), 1, None):
                    ends[end] = None if end in ends else name
            for end, name_or_none in ends.items():
                found.setdefault(end, []).append((tie, name_or_none))
        return found


def prefix_of(adapter: Adapter, base: Checkpoint) -> tuple[str, str]:
    """(removed, added): the one prefix by which all names of an adapter land, see `match`; two times "" for none."""
    base = with_task_head(replicated(base, adapter.config.layers), adapter)
    prefix = _one_prefix(adapter.updates, base, _Atlas(base, ties_of(base, adapter.updates)))
    return prefix.removed, prefix.added


_ROLES = {
    **dict.fromkeys(("encoder", "enc"), "encoder"),
    **dict.fromkeys(("decoder", "dec"), "decoder"),
    **dict.fromkeys(("vision", "visual", "image"), "vision"),
    **dict.fromkeys(("text", "language"), "text"),
    **{word: word for word in ("audio", "self", "cross", "up", "down", "mid")},
}


# What vision-language and audio classes of transformers call the language model inside them.
_LANGUAGE_MODELS = frozenset({"language_model", "text_model"})

# A path of more components is nobody's, and each would be looked for in all names of the base.
_MOST_PREFIXES = 32


class _Prefix:
    """Renames every weight by one prefix that is added, removed, or put in the place of another."""

    def __init__(self, added: str = "", removed: str = "") -> None:
        self.added, self.removed = added, removed

    def __call__(self, weight: str) -> str:
        return self.added + weight.removeprefix(self.removed)

    @property
    def is_wrapping(self) -> bool:
        """Whether the two differ by what a class with other inputs puts around the same language model."""
        before, after = (
            [part for part in side.split(".") if part not in _LANGUAGE_MODELS] for side in (self.removed, self.added)
        )
        return before == after

    @property
    def keeps_numbers(self) -> bool:
        """Whether no layer becomes another one."""
        before, after = (re.findall(r"\d+", side) for side in (self.removed, self.added))
        return before == after

    @property
    def keeps_roles(self) -> bool:
        """Whether no part of a model becomes one of another purpose: an encoder a decoder, say."""
        before, after = (
            {_ROLES[word] for word in re.split(r"[._]", side) if word in _ROLES} for side in (self.removed, self.added)
        )
        return before == after


def _one_prefix(updates: Mapping[str, tuple[Update, ...]], base: Checkpoint, atlas: _Atlas) -> _Prefix:
    """The prefix that makes *all* names land, where the adapter was made on a bare or on a wrapped model.

    Only where no name lands unchanged, one prefix serves all of them, and it is the only one that does.
    """
    chains = {name: chain for name, chain in updates.items() if not is_optional(chain)}
    if not chains or any(atlas.find(name) is not None for name in chains):
        return _Prefix()
    first = next(iter(chains))
    known = list(dict.fromkeys((*base.tensors, *atlas.places)))
    candidates = [_Prefix(added=name[: -len(first)]) for name in known if name.endswith("." + first)]
    shorter = (removed for removed in _prefixes(first) if atlas.find(first.removeprefix(removed)) is not None)
    candidates.extend(_Prefix(removed=removed) for removed in shorter)
    if found := _only_home(candidates, chains, atlas):
        return found
    if candidates:
        return _Prefix()
    is_known = tied_names(base.config) is not None
    exchanged = (
        _Prefix(added=name[: -len(first) + len(removed)], removed=removed)
        for removed in _prefixes(first)
        if not any(name.startswith(removed) for name in known)  # else the part is there, stored otherwise
        for name in known
        if name.endswith("." + first.removeprefix(removed))
    )
    fitting = [
        prefix
        for prefix in exchanged
        if (prefix.is_wrapping or (not is_known and prefix.keeps_numbers and prefix.keeps_roles))
        and _has_shapes(chains, prefix, atlas)
    ]
    return _only_home(fitting, chains, atlas) or _Prefix()


def _prefixes(name: str) -> Iterable[str]:
    """The begins of a name that leave two components or more, shortest first."""
    parts = name.split(".")
    return [".".join(parts[:cut]) + "." for cut in range(1, min(len(parts) - 1, _MOST_PREFIXES))]


def _only_home(candidates: Iterable[_Prefix], names: Iterable[str], atlas: _Atlas) -> _Prefix | None:
    """The prefix with which all names land; None where none does, or where two lead to different places."""
    fitting = [
        prefix
        for prefix in candidates
        if all(name.startswith(prefix.removed) and atlas.find(prefix(name)) is not None for name in names)
    ]
    homes = {frozenset(piece for name in names for piece in _pieces(atlas, prefix(name))) for prefix in fitting}
    return fitting[0] if len(homes) == 1 else None


def _has_shapes(chains: Mapping[str, tuple[Update, ...]], prefix: _Prefix, atlas: _Atlas) -> bool:
    """Whether every update has the shape of the tensor that a prefix leads to, as it is stored."""
    for name, chain in chains.items():
        place = atlas.find(prefix(name))
        if place is None or any(_misfits(name, chain, place, transposed=False, followed=None)):
            return False
    return True


def _pieces(atlas: _Atlas, name: str) -> tuple[StoredRows, ...]:
    place = atlas.find(name)
    return () if place is None else place.pieces


def _followed(name: str, adapter: Adapter, atlas: _Atlas) -> tuple[int, ...] | None:
    """The shape of a table that a name follows, because its tied partner is replaced; None where there is none."""
    tables = (
        update
        for other in atlas.partners_of(name)
        for update in adapter.updates.get(other, ())
        if isinstance(update, Replace)
    )
    return next((update.shape for update in tables if update.follows_tie), None)


def _misfits(
    weight: str, updates: tuple[Update, ...], place: StoredWeight, transposed: bool, followed: tuple[int, ...] | None
) -> Iterable[Misfit]:
    stored = place.shape
    expected = followed or ((*stored[:-2], *stored[-2:][::-1]) if transposed else stored)
    for update in updates:
        if isinstance(update, Replace):
            is_part = place.pieces[0].part != WHOLE
            if not update.fits(stored) or (is_part and update.shape != stored):
                yield Misfit(weight, update.shape, stored)
            expected = update.shape[::-1] if transposed else update.shape
        elif not update.fits(expected):
            yield Misfit(weight, update.shape, stored)
