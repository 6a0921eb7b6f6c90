"""The JSON Schemas of what we read and what we emit: load one, check a value against it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.protocols import Validator

SUFFIX = ".schema.json"


def names() -> tuple[str, ...]:
    """The schemas that there are: "native-config-1", "report" and so on."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in _folder().iterdir() if path.name.endswith(SUFFIX)))


@lru_cache(maxsize=32)
def load(name: str) -> dict[str, Any]:
    """The schema called `name`, parsed. Raises KeyError: there is none."""
    path = _folder() / f"{name}{SUFFIX}"
    if not path.is_file():
        raise KeyError(name)
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema


def check(name: str, value: Mapping[str, Any] | list[Any]) -> Iterator[tuple[str, str]]:
    """What breaks the schema called `name`: (path to the place, "" for the whole; what is wrong), sorted by place.

    Values are shown in part; nothing in `value` makes this slow, for our schemas have no patterns over free text.
    """
    errors = [(_pointer(error.absolute_path), _message(error)) for error in _validator(name).iter_errors(value)]
    yield from sorted(set(errors))


@lru_cache(maxsize=32)
def _validator(name: str) -> Validator:
    return jsonschema.Draft202012Validator(load(name))


def _pointer(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f'["{part}"]' if text else str(part)
    return text


def _message(error: jsonschema.ValidationError) -> str:
    found = json.dumps(error.instance, ensure_ascii=True, default=str)
    shown = found if len(found) <= 80 else f"{found[:80]}…"
    if error.validator == "required":
        return error.message
    expected = error.schema.get("description") if isinstance(error.schema, dict) else None
    if expected:
        return f"expected {expected}, found {shown}"
    return f"{error.validator} {json.dumps(error.validator_value)} is broken by {shown}"


def _folder() -> Path:
    """Inside the package where it is installed, beside it in a checkout."""
    inside = Path(str(files("loraformat"))) / "schemas"
    return inside if inside.is_dir() else Path(str(files("loraformat"))).parent / "schemas"
