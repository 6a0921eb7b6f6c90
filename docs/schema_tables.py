"""The page of the JSON Schemas: who writes each, its version, and its fields in tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loraformat import schema

_HEAD = """# JSON schemas

What loraformat writes and reads as JSON. Generated from the files in `schemas/` by docs/generate.py; an installation
has them in `loraformat/schemas/`. A version changes only with a major version of loraformat
([decision 3](decisions/0003-codes-and-versions.md)).

| schema | version | who writes and reads it |
|---|---|---|
"""
_ABSENT = "-"


def page() -> str:
    """docs/schemas.md."""
    every = {name: schema.load(name) for name in schema.names()}
    index = "".join(f"| [{name}](#{name}) | {_version(each)} | {each['$comment']} |\n" for name, each in every.items())
    return _HEAD + index + "".join("\n" + "\n".join(_section(name, each)) + "\n" for name, each in every.items())


def _version(each: dict[str, Any]) -> str:
    return str(each["$id"].rpartition(":")[2])


def _section(name: str, each: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield f"{each['title']}."
    if "description" in each:
        yield ""
        yield each["description"]
    yield ""
    yield f"[schemas/{name}.schema.json](../schemas/{name}.schema.json)"
    yield ""
    yield from _table(name, each, each)
    for label, part in each.get("$defs", {}).items():
        if "properties" in part:
            yield ""
            yield f"### {name}: {label}"
            yield ""
            if "description" in part:
                yield f"{part['description'][0].upper()}{part['description'][1:]}."
                yield ""
            yield from _table(name, each, part)


def _table(name: str, root: dict[str, Any], part: dict[str, Any]) -> Iterator[str]:
    yield "| field | value | required | |"
    yield "|---|---|---|---|"
    yield from _rows(name, root, part, "")


def _rows(name: str, root: dict[str, Any], part: dict[str, Any], before: str) -> Iterator[str]:
    """A row for each field; those of objects that have no name of their own follow with their path."""
    for field, value in _fields(part).items():
        path = f"{before}{field}"
        needed = "yes" if field in part.get("required", ()) else ""
        note = value.get("description", "") or _described(root, value)
        yield f"| `{path}` | {_cell(_kind(name, root, value))} | {needed} | {_cell(note)} |"
        for inner, suffix in _inner(root, value):
            yield from _rows(name, root, inner, f"{path}{suffix}.")


def _fields(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Field → its schema, where that depends on other fields any of those that it may have."""
    found = dict(part.get("properties", {}))
    conditions = [part, *(each for each in part.get("allOf", ()) if "if" in each)]
    branches = [each[key]["properties"] for each in conditions for key in ("then", "else") if key in each]
    for field in dict.fromkeys(name for branch in branches for name in branch):
        if not found.get(field):
            found[field] = {"anyOf": [branch[field] for branch in branches if field in branch]}
    return found


def _inner(root: dict[str, Any], value: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects inside of a field without a table of their own, each with what stands behind the field in their path."""
    if "$ref" in value:
        target = _target(root, value["$ref"])[1]
        if "properties" not in target:
            yield from _inner(root, target)
    if "properties" in value:
        yield value, ""
    for key, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(value.get(key), dict):
            yield from ((inner, f"{suffix}{more}") for inner, more in _inner(root, value[key]))
    for key in ("anyOf", "oneOf", "allOf"):
        for each in value.get(key, ()):
            yield from _inner(root, each)


def _kind(name: str, root: dict[str, Any], value: Any) -> str:  # noqa: ANN401 - JSON
    """The values that a field may have, in words."""
    if not isinstance(value, dict) or not value:
        return "any"
    if "$ref" in value:
        label, target = _target(root, value["$ref"])
        has_table = "properties" in target and label in root["$defs"]
        return f"[{label}](#{name}-{label.lower()})" if has_table else _kind(name, root, target)
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            kinds = [_kind(name, root, each) for each in value[key] if each]
            return " or ".join(dict.fromkeys(part for kind in kinds for part in kind.split(" or ")))
    if "not" in value:
        return _ABSENT
    types = value.get("type", "any")
    return " or ".join(_one(name, root, value, each) for each in ([types] if isinstance(types, str) else types))


def _one(name: str, root: dict[str, Any], value: dict[str, Any], kind: str) -> str:
    if kind == "array" and "prefixItems" in value:
        return f"[{', '.join(_kind(name, root, each) for each in value['prefixItems'])}]"
    if kind == "array" and value.get("items"):
        return f"list of {_kind(name, root, value['items'])}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"object, name → {_kind(name, root, value['additionalProperties'])}"
    return {"array": "list"}.get(kind, kind)


def _target(root: dict[str, Any], reference: str) -> tuple[str, dict[str, Any]]:
    """The last step of a reference, and what it leads to in the same schema."""
    target: Any = root
    steps = reference.removeprefix("#/").split("/")
    for step in steps:
        target = target[step]
    return steps[-1], target


def _described(root: dict[str, Any], value: dict[str, Any]) -> str:
    if "$ref" not in value:
        return ""
    target = _target(root, value["$ref"])[1]
    return "" if "properties" in target else str(target.get("description", ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
