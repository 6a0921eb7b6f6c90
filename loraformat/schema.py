"""The JSON Schemas of what we read and what we emit: load one, check a value against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.diagnostics import json_path

if TYPE_CHECKING:
    from jsonschema import ValidationError
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


def check(name: str, value: Mapping[str, Any] | list[Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What breaks the schema called `name`: (keys and indices, none for the whole; what is wrong), sorted by place.

    Values are shown in part; nothing in `value` makes this slow, for our schemas have no patterns over free text.
    A value that a quick look finds in order is not shown to jsonschema, whose import takes longer than all the rest.
    """
    if _holds(load(name), value, load(name)):
        return
    errors = {(tuple(error.absolute_path), _message(error)) for error in _validator(name).iter_errors(value)}
    yield from sorted(errors, key=lambda error: (json_path(error[0]), error[1]))


@lru_cache(maxsize=32)
def _validator(name: str) -> Validator:
    import jsonschema

    return jsonschema.Draft202012Validator(load(name))


def _message(error: ValidationError) -> str:
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
    package = Path(__file__).parent
    inside = package / "schemas"
    return inside if inside.is_dir() else package.parent / "schemas"


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_SILENT = frozenset(
    {"$schema", "$id", "$defs", "title", "description", "examples", "default", "$comment", "then", "else"}
)


def _holds(schema: Mapping[str, Any] | bool, value: object, root: Mapping[str, Any]) -> bool:
    """Whether a value surely meets a schema; False also where a keyword is not known here."""
    if isinstance(schema, bool):
        return schema
    return all(key in _SILENT or _meets(key, schema, value, root) for key in schema)


def _meets(key: str, schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:  # noqa: C901 - a case for each keyword
    stated = schema[key]
    match key:
        case "type":
            return any(_is(value, name) for name in ([stated] if isinstance(stated, str) else stated))
        case "enum":
            return any(type(value) is type(each) and value == each for each in stated)
        case "const":
            return type(value) is type(stated) and value == stated
        case "minimum" | "maximum":
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return not is_number or (value >= stated if key == "minimum" else value <= stated)
        case "minLength":
            return not isinstance(value, str) or len(value) >= stated
        case "pattern":
            return not isinstance(value, str) or re.search(stated, value) is not None
        case "minItems" | "maxItems":
            return not isinstance(value, list) or (len(value) >= stated if key == "minItems" else len(value) <= stated)
        case "prefixItems":
            return not isinstance(value, list) or all(_holds(*pair, root) for pair in zip(stated, value, strict=False))
        case "uniqueItems":
            return not isinstance(value, list) or (_is_simple(value) and len(set(value)) == len(value))
        case "required":
            return not isinstance(value, dict) or all(name in value for name in stated)
        case "properties":
            return not isinstance(value, dict) or all(
                _holds(stated[name], each, root) for name, each in value.items() if name in stated
            )
        case "additionalProperties":
            known = schema.get("properties", {})
            return not isinstance(value, dict) or all(
                _holds(stated, each, root) for name, each in value.items() if name not in known
            )
        case "items" if "prefixItems" not in schema:
            return not isinstance(value, list) or all(_holds(stated, each, root) for each in value)
        case "anyOf":
            return any(_holds(each, value, root) for each in stated)
        case "if":
            branch = "then" if _holds(stated, value, root) else "else"
            return _is_plain(stated) and _holds(schema.get(branch, True), value, root)
        case "$ref":
            found = root.get("$defs", {}).get(stated.removeprefix("#/$defs/"))
            return found is not None and _holds(found, value, root)
    return False


def _is_plain(schema: object) -> bool:
    """Whether a condition has only keywords about which a quick look is never in doubt."""
    if not isinstance(schema, dict):
        return True
    plain = (
        all(key in ("required", "properties", "minItems", "type") for key in schema) and schema.get("type") != "integer"
    )
    return plain and all(_is_plain(each) for each in schema.get("properties", {}).values())


def _is(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _is_simple(values: list[Any]) -> bool:
    """Whether values are all texts or all integers, so that a set tells which are equal."""
    return {type(each) for each in values} in (set(), {str}, {int})
