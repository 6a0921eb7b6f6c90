"""Fields of a config, read with their type and bounds; everything else is a ConfigError that names field and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TypeAlias

from loraformat.diagnostics import FindingLocation, in_file
from loraformat.errors import ConfigError, ContainerError
from loraformat.model.bundle import Bundle, Json, JsonFile

Config: TypeAlias = Mapping[str, Json]


def _wrong(value: Json, where: FindingLocation, expected: str) -> ConfigError:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False) if _is_short(value) else "something else"
    return ConfigError(f"expected {expected}, found {text}", where=where)


def _is_short(value: Json) -> bool:
    return isinstance(value, (bool, float)) or (isinstance(value, str) and len(value) < 100) or _is_short_int(value)


def _is_short_int(value: Json) -> bool:
    return isinstance(value, int) and value.bit_length() < 128


def readable(bundle: Bundle, name: str) -> Json:
    """The value of a JSON file; None where there is no such file, or it is damaged: whoever reads it says so."""
    file = bundle.files.get(name)
    try:
        return file.load() if isinstance(file, JsonFile) else None
    except ContainerError:
        return None


def as_object(value: Json, where: FindingLocation) -> dict[str, Json]:
    """A JSON object. Raises ConfigError."""
    if not isinstance(value, dict):
        raise _wrong(value, where, "an object")
    return value


def as_integer(value: Json, where: FindingLocation, low: int, high: int) -> int:
    """An integer of `low` to `high`; 8.0 counts, true does not. Raises ConfigError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(value, where, f"an integer of {low} to {high}")
    return value


def as_number(value: Json, where: FindingLocation) -> float:
    """A finite number; integers stay integers. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise _wrong(value, where, "a finite number")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_text(value: Json, where: FindingLocation) -> str:
    """A string. Raises ConfigError."""
    if not isinstance(value, str):
        raise _wrong(value, where, "a string")
    return value


def as_boolean(value: Json, where: FindingLocation) -> bool:
    """True or false. Raises ConfigError."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def as_texts(value: Json, where: FindingLocation) -> tuple[str, ...]:
    """A list of strings. Raises ConfigError."""
    if not isinstance(value, list):
        raise _wrong(value, where, "a list of strings")
    return tuple(as_text(item, where.at(number)) for number, item in enumerate(value))


def _field(file: str | FindingLocation, field: str) -> FindingLocation:
    return (in_file(file) if isinstance(file, str) else file).at(field)


def names_or_pattern(config: Config, field: str, file: str | FindingLocation) -> tuple[str, ...] | str | None:
    """A list of names, one string, or None where the field is absent or null. Raises ConfigError."""
    value = config.get(field)
    return value if value is None or isinstance(value, str) else as_texts(value, _field(file, field))


def optional_text(config: Config, field: str, file: str | FindingLocation) -> str | None:
    """A string, or None where the field is absent or null. Raises ConfigError."""
    value = config.get(field)
    return None if value is None else as_text(value, _field(file, field))


def optional_number(config: Config, field: str, file: str | FindingLocation) -> float | None:
    """A finite number, or None where the field is absent or null. Raises ConfigError."""
    value = config.get(field)
    return None if value is None else as_number(value, _field(file, field))


def optional_boolean(config: Config, field: str, file: str | FindingLocation) -> bool | None:
    """True or false, or None where the field is absent or null. Raises ConfigError."""
    value = config.get(field)
    return None if value is None else as_boolean(value, _field(file, field))


def optional_integer(config: Config, field: str, file: str | FindingLocation, low: int, high: int) -> int | None:
    """An integer of `low` to `high`, or None where the field is absent or null. Raises ConfigError."""
    value = config.get(field)
    return None if value is None else as_integer(value, _field(file, field), low, high)
