"""Which part of an update applies to a stored tensor, and where a weight of the loaded model is in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraformat.model.checkpoint import Checkpoint
from loraformat.naming import Spelled, Spelling, spelling_of


@dataclass(frozen=True, slots=True)
class RowMap:
    """A map of rows: some rows of the update as it is stored → some rows of the tensor.

    Attributes:
        expert: which slice of a stacked update; None for all of a stack, or for an update that is none.
        rows: (start, stop) of the rows taken, after the update was transposed as the tensor is stored; None for all,
            where they are all that the tensor, or its expert, has.
        at: the first row of the tensor that they go to; rows of a stack are counted through all its experts.
    """

    expert: int | None = None
    rows: tuple[int, int] | None = None
    at: int = 0


WHOLE = RowMap()


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A stored tensor, or a run of its rows, that holds a part of a weight of the loaded model."""

    tensor: str
    part: RowMap = WHOLE


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of the loaded model in a checkpoint.

    Attributes:
        shape: of the weight, as it is stored: a transposed tensor has its stored shape.
        pieces: the tensors that hold it.
        is_transposed: whether the loaded model has the transpose of what is stored.
    """

    shape: tuple[int, ...]
    pieces: tuple[StoredRows, ...]
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    tensor: str
    shape: tuple[int, ...]
    spelled: Spelled


class _Same:
    """A base as a key of a cache: itself, not its contents."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base

    def __hash__(self) -> int:
        return id(self.base)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.base is self.base


def places_of(base: Checkpoint) -> Mapping[str, StoredWeight]:
    """Name in memory → where it is stored. Left out: what is stored in another way than by rows, and what is not clear.

    A weight that is stored in parts is only here where all parts are. Each rule and the merger asks for the same base,
    and large models have tens of thousands of experts, so the last answers are kept.
    """
    return _places(_Same(base))


@lru_cache(maxsize=2)
def _places(same: _Same) -> Mapping[str, StoredWeight]:
    base, spelling = same.base, spelling_of(same.base.config)
    if not spelling.rules:
        return {name: StoredWeight(tensor.shape, (StoredRows(name),)) for name, tensor in base.tensors.items()}
    found: dict[str, list[_Found]] = {}
    for name, tensor in base.tensors.items():
        spelled = spelling.in_memory(name)
        for target in spelled.names:
            found.setdefault(target, []).append(_Found(name, tensor.shape, spelled))
    places = {name: _place(name, several) for name, several in found.items()}
    return {name: place for name, place in places.items() if place is not None}


def _place(name: str, several: list[_Found]) -> StoredWeight | None:
    operations = {each.spelled.operation for each in several}
    first = several[0]
    if operations == {"experts"}:
        return _stacked(several)
    if operations == {"join"}:
        joined = _joined(several)
        return None if joined is None else StoredWeight(joined[0], tuple(joined[1]))
    if len(several) > 1:
        return None
    match first.spelled.operation:
        case "rename":
            return StoredWeight(first.shape, (StoredRows(first.tensor),))
        case "transpose":
            return StoredWeight(first.shape, (StoredRows(first.tensor),), is_transposed=True)
        case "split":
            return _cut(name, first)
    return None


def _cut(name: str, stored: _Found) -> StoredWeight | None:
    count = len(stored.spelled.names)
    rows = stored.shape[0] if stored.shape else 0
    if rows == 0 or rows % count:
        return None
    height = rows // count
    at = stored.spelled.names.index(name) * height
    return StoredWeight((height, *stored.shape[1:]), (StoredRows(stored.tensor, RowMap(rows=(0, height), at=at)),))


def _stacked(several: list[_Found]) -> StoredWeight | None:
    experts: dict[int, list[_Found]] = {}
    for each in several:
        if each.spelled.expert is None:
            return None
        experts.setdefault(each.spelled.expert, []).append(each)
    if sorted(experts) != list(range(len(experts))):
        return None
    pieces: list[StoredRows] = []
    shapes = set()
    for number in sorted(experts):
        joined = _joined(experts[number], number)
        if joined is None:
            return None
        shapes.add(joined[0])
        pieces += joined[1]
    return StoredWeight((len(experts), *shapes.pop()), tuple(pieces)) if len(shapes) == 1 else None


def _joined(several: list[_Found], expert: int | None = None) -> tuple[tuple[int, ...], list[StoredRows]] | None:
    """The shape of tensors joined by rows in the order of their sources, and each with the rows that it takes."""
    ordered = sorted(several, key=lambda each: each.spelled.source)
    is_whole = [each.spelled.source for each in ordered] == list(range(ordered[0].spelled.sources))
    if not is_whole or not all(each.shape for each in ordered) or len({each.shape[1:] for each in ordered}) != 1:
        return None
    pieces, start = [], 0
    for each in ordered:
        stop = start + each.shape[0]
        pieces.append(StoredRows(each.tensor, RowMap(expert, (start, stop) if len(ordered) > 1 else None)))
        start = stop
    return (start, *ordered[0].shape[1:]), pieces


def place_of_older_name(weight: str, spelling: Spelling, places: Mapping[str, StoredWeight]) -> StoredWeight | None:
    """Where a weight is stored that the adapter calls by a name that checkpoints used before, or by one expert of it.

    Args:
        weight: as the adapter has it.
        places: see `places_of`.
    """
    spelled = spelling.in_memory(weight)
    homes = [places[name] for name in spelled.names if name in places]
    if len(homes) != len(spelled.names) or any(len(home.pieces) != 1 or home.is_transposed for home in homes):
        return None
    match spelled.operation:
        case "rename":
            return homes[0] if spelled.names[0] != weight else None
        case "experts":
            return _slice_of_stack(spelled, homes[0])
        case "split":
            return _laid_together(homes)
    return None


def _slice_of_stack(spelled: Spelled, stack: StoredWeight) -> StoredWeight | None:
    if len(stack.shape) != 3 or spelled.expert is None or spelled.expert >= stack.shape[0]:
        return None
    if stack.shape[1] % spelled.sources:
        return None
    height = stack.shape[1] // spelled.sources
    at = spelled.expert * stack.shape[1] + spelled.source * height
    return StoredWeight(
        (height, stack.shape[2]), (StoredRows(stack.pieces[0].tensor, RowMap(rows=(0, height), at=at)),)
    )


def _laid_together(homes: list[StoredWeight]) -> StoredWeight | None:
    if any(home.shape != homes[0].shape or home.pieces[0].part != WHOLE for home in homes):
        return None
    return StoredWeight((sum(home.shape[0] for home in homes), *homes[0].shape[1:]), tuple(_pieces_in_order(homes)))


def _pieces_in_order(homes: list[StoredWeight]) -> Iterator[StoredRows]:
    start = 0
    for home in homes:
        stop = start + home.shape[0]
        yield StoredRows(home.pieces[0].tensor, RowMap(rows=(start, stop)))
        start = stop
