"""What all kinds of update share: their line in the table of kinds, and their tensors, found by their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from loraformat.model.tensors import LazyTensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Update = TypeVar("_Update", bound="DataclassInstance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the rest of the package needs to know of a kind of update beside its class.

    A function gets an update of the kind first, hence `Any`.

    Attributes:
        name: in reports and manifests.
        formula: the weight after the update; W is the weight before it, s the scale, f(W) is computed from the base.
        family: what it counts as in the conversion matrix, see `formats.kit.base.CONTENTS`.
        label: what the field calls it, where that is not `name`.
        unit: one of them, in a count.
        units: several of them, where that is not `unit` with an s.
        is_sum: whether its tensors alone give a matrix that is added: for DoRA, before the magnitude is applied.
        overwrites: whether it sets values, whatever the base has there.
        has_scale: whether it has a `scale` by which all that it adds is multiplied.
        has_rank: whether it has a `rank`, that of its factors.
        has_strength: whether it can be merged at a strength other than 1.
        needs_base: whether what it changes depends on the values of the base.
        by_rows: whether rows of it, as stored, can be computed without the others; (update, transposed).
        row_unit: how many rows of the stored tensor it needs together; (update, transposed, rows of the tensor).
        whole: values of the largest matrix that must be in memory as a whole; (update, rows, cols), None for none.
        operand: another weight of the base that it is computed from, and the shape of that; (update), None for none.
        variants: (whether an update is one, the line that holds for it) of what has a line of its own within a class.
    """

    name: str
    formula: str | Callable[[Any], str]
    family: str
    label: str = ""
    unit: str = ""
    units: str = ""
    is_sum: bool = False
    overwrites: bool = False
    has_scale: bool = False
    has_rank: bool = False
    has_strength: bool = False
    needs_base: bool = False
    by_rows: Callable[[Any, bool], bool] = lambda _update, _transposed: False
    row_unit: Callable[[Any, bool, int], int] = lambda _update, _transposed, _rows: 1
    whole: Callable[[Any, int, int], int] | None = None
    operand: Callable[[Any], tuple[str, tuple[int, int]]] | None = None
    variants: tuple[tuple[Callable[[Any], bool], Kind], ...] = ()

    @property
    def noun(self) -> str:
        """One of it, in a sentence: "a full weight"."""
        return f"a {self.unit}" if self.unit else f"an update of the kind {self.name}"


def tensors(update: DataclassInstance) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors that an update is made of, each with its role: "up", "magnitude", "left0"."""
    for name, value in _values(update):
        if isinstance(value, LazyTensor):
            yield name, value
        elif _holds_tensors(value):
            yield from ((f"{name}{number}", each) for number, each in enumerate(value))
        elif is_dataclass(value) and not isinstance(value, type):
            yield from ((name, each) for _, each in tensors(value))


def map_tensors(update: _Update, change: Callable[[LazyTensor], LazyTensor]) -> _Update:
    """The update with each of its tensors changed; all else stays."""
    changed: dict[str, object] = {}
    for name, value in _values(update):
        if isinstance(value, LazyTensor):
            changed[name] = change(value)
        elif _holds_tensors(value):
            changed[name] = tuple(map(change, value))
        elif is_dataclass(value) and not isinstance(value, type):
            changed[name] = map_tensors(value, change)
    return replace(update, **changed)


def settings(update: DataclassInstance) -> dict[str, object]:
    """What an update says beside its tensors: rows, sides, a scale, an activation, the axis of a magnitude."""
    found: dict[str, object] = {}
    for name, value in _values(update):
        if is_dataclass(value) and not isinstance(value, (LazyTensor, type)):
            found |= {f"{name}.{inner}": each for inner, each in settings(value).items()}
        elif not isinstance(value, LazyTensor) and not _holds_tensors(value):
            found[name] = value
    return found


def size(tensor: LazyTensor, axis: int) -> int:
    """The length of an axis; 0 where a damaged file has a tensor without it."""
    return tensor.shape[axis] if axis < len(tensor.shape) else 0


def is_product(factors: tuple[LazyTensor, ...]) -> bool:
    """Whether two factors fit each other; one alone always does."""
    return len(factors) == 1 or size(factors[0], 1) == size(factors[1], 0)


def is_shape(update: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether an update is as large as a weight, which may have one more axis of length 1 in front."""
    return update == weight or (weight[:1] == (1,) and update == weight[1:])


def _values(update: DataclassInstance) -> Iterator[tuple[str, object]]:
    return ((name, getattr(update, name)) for name in _names(type(update)))


@cache
def _names(kind: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _holds_tensors(value: object) -> TypeGuard[tuple[LazyTensor, ...]]:
    """Whether a value is a tuple of tensors; of a tuple of numbers, which may be long, only the first is looked at."""
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], LazyTensor)
