"""Plans, tasks and receipts as JSON values and back: frozen dataclasses of plain fields, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from loraformat.errors import ConfigError
from loraformat.model.bundle import Json

T = TypeVar("T")


def to_plain(value: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """The fields of a dataclass, and of those in it, as JSON values; tuples become lists when they are written."""
    return asdict(value)


class _AnyJson:
    value: Json


# `get_type_hints` resolves the names inside, so that a field's hint is another object than `Json`.
_JSON = get_type_hints(_AnyJson)["value"]


def from_plain(kind: type[T], value: Json, where: str) -> T:
    """A dataclass from its fields.

    Args:
        kind: a dataclass whose fields are dataclasses, tuples, dicts by str, numbers, text, JSON values, or unions.
        value: as `to_plain` gave it and `json` read it back.
        where: for messages.

    Raises: ConfigError (LF103): a field is missing, unknown, or not of its type.
    """
    found: T = _dataclass(kind, value, where)
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _dataclass(kind: Any, value: Json, where: str) -> Any:  # noqa: ANN401
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected an object, found {type(value).__name__}", where=where)
    hints, known = _hints(kind), {one.name: one for one in fields(kind)}
    unknown = sorted(value.keys() - known.keys())
    if unknown:
        raise ConfigError(f'unknown field "{unknown[0]}"', where=where)
    missing = [
        name
        for name, one in known.items()
        if name not in value and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f'the field "{missing[0]}" is missing', where=where)
    return kind(**{name: _value(hints[name], found, f"{where}.{name}") for name, found in value.items()})


def _value(kind: Any, value: Json, where: str) -> Any:  # noqa: ANN401 - one line a kind of type
    if kind == _JSON:
        return value
    origin = get_origin(kind)
    if origin is Union or origin is UnionType:
        return _union(get_args(kind), value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        return _tuple(get_args(kind), value, where)
    if origin is dict and isinstance(value, Mapping):
        return {name: _value(get_args(kind)[1], one, f"{where}[{name!r}]") for name, one in value.items()}
    if kind is float and type(value) is int and abs(value) < 1 << 1023:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(f"expected {getattr(kind, '__name__', kind)}, found {value!r:.60}", where=where)


def _union(kinds: tuple[Any, ...], value: Json, where: str) -> Any:  # noqa: ANN401
    if value is None and type(None) in kinds:
        return None
    left = [kind for kind in kinds if kind is not type(None)]
    chosen = next((kind for kind in left if _looks_like(kind, value)), left[-1])
    return _value(chosen, value, where)


def _looks_like(kind: Any, value: Json) -> bool:  # noqa: ANN401
    """Whether a value can only be meant as this kind of a union: by its JSON type."""
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple))
    if is_dataclass(kind) or get_origin(kind) is dict:
        return isinstance(value, Mapping)
    return type(value) is kind or (kind is float and type(value) is int)


def _tuple(kinds: tuple[Any, ...], value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"expected a list, found {type(value).__name__}", where=where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_value(kinds[0], one, f"{where}[{number}]") for number, one in enumerate(value))
    if len(kinds) != len(value):
        raise ConfigError(f"expected {len(kinds)} values, found {len(value)}", where=where)
    return tuple(_value(kind, one, f"{where}[{at}]") for at, (kind, one) in enumerate(zip(kinds, value, strict=True)))
