"""Writes docs/surface.md: everything that others may rely on, as a list. A test compares it with the package.

Run: python docs/surface.py. What a change of the list means for a release is in docs/stability.md.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import yaml

import loraformat
from loraformat.cli import COMMANDS, main
from loraformat.cli.refusals import EXIT_CODES, INTERNAL_ERROR
from loraformat.errors import LoraFormatError
from loraformat.jobs.explain import pages
from loraformat.jobs.formats import formats
from loraformat.jobs.inputs.settings import NAMES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "surface.md"
HEAD = """# The public surface

Everything that [stability](stability.md) makes promises about. `python docs/surface.py` writes this page; a test
compares it with the package, so that nothing here changes by accident. `?` marks what may be left out, `…` what can
be repeated. Arguments in Python are numbered if they may be passed by position.
"""


def page() -> str:
    """The whole page."""
    parts = {
        "Commands": commands(),
        "Exit codes": exit_codes(),
        "Codes": codes(),
        "Formats": (f"{each.name}: {'read, written' if each.writes else 'read'}" for each in formats()),
        "JSON": schemas(),
        "Settings": settings(),
        "Environment": environment(),
        "Extras": extras(),
        "Action and hook": ci(),
        "Python": python(),
    }
    return HEAD + "".join(f"\n## {title}\n\n```text\n" + "\n".join(lines) + "\n```\n" for title, lines in parts.items())


def commands() -> Iterator[str]:
    """Each command, below it its arguments and options."""
    assert isinstance(main, click.Group)
    ctx = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(ctx, name)
        assert command is not None
        yield f"loraformat {name}"
        yield from (f"    {_parameter(each)}" for each in command.params)


def _parameter(parameter: click.Parameter) -> str:
    more = "…" if parameter.multiple or parameter.nargs == -1 else ""
    if isinstance(parameter, click.Argument):
        name = parameter.metavar or (parameter.name or "").upper()
        return f"{name.rstrip('.')}{more}{'' if parameter.required else '?'}"
    assert isinstance(parameter, click.Option)
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        return names
    return f"{names} {_values(parameter)}{more}{_default(parameter)}{' (required)' if parameter.required else ''}"


def _values(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.metavar or option.type.name.upper().partition(" ")[0]


def _default(option: click.Option) -> str:
    shown = isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool)
    return f" = {option.default}" if shown else ""


def exit_codes() -> Iterator[str]:
    """Each exit code with the errors that end in it."""
    names: dict[int, list[str]] = {0: ["done"], 1: ["findings"], 2: ["click.UsageError"]}
    for kind, number in EXIT_CODES:
        names.setdefault(number, []).append(kind.__name__)
    names[INTERNAL_ERROR] = ["a bug"]
    names |= {129: ["SIGHUP"], 143: ["SIGTERM"], 149: ["SIGBREAK"]}
    return (f"{number}: {', '.join(names[number])}" for number in sorted(names))


def codes() -> Iterator[str]:
    """Each code with its name, below it its severity."""
    for code, each in sorted(pages().items()):
        yield f"{code} {each.name}"
        yield f"    {each.severity.value}"


def schemas() -> Iterator[str]:
    """Each schema of the JSON that is written or read: its identity, below it each property with its type."""
    for path in sorted((ROOT / "schemas").glob("*.schema.json")):
        if path.name.startswith("peft-"):  # PEFT's, not ours
            continue
        schema = json.loads(path.read_text(encoding="utf-8"))
        version = schema.get("properties", {}).get("schema", schema.get("properties", {}).get("version", {}))
        yield f"{path.name}: {version.get('const', schema.get('$id', ''))}"
        yield from (f"    {line}" for line in _properties(schema))


# Keywords of JSON Schema that hold schemas by name, and how the place of such a schema is written.
_NAMED = {"properties": "{}/{}", "$defs": "#{1}", "definitions": "#{1}", "patternProperties": "{}/{}"}


def _properties(schema: object, where: str = "") -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _properties(each, where)
    elif isinstance(schema, dict):
        required = set(schema.get("required", ()))
        for name, value in sorted(schema.get("properties", {}).items()):
            yield f"{where}/{name}{'' if name in required else '?'}: {_type(value)}"
        for key, value in sorted(schema.items()):
            if key in _NAMED:
                for name in sorted(value):
                    yield from _properties(value[name], _NAMED[key].format(where, name))
            elif key not in ("examples", "enum", "const", "default", "required"):
                yield from _properties(value, where)


def _type(schema: object) -> str:
    """What a value may be: its types or values, or the definition that says so."""
    if not isinstance(schema, dict):
        return "anything"
    if "$ref" in schema:
        return f"#{schema['$ref'].rpartition('/')[2]}"
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return "|".join(sorted(map(json.dumps, values)))
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return (" & " if key == "allOf" else " | ").join(map(_type, schema[key]))
    types = schema.get("type", "anything")
    items = f"array of {_type(schema['items'])}" if "items" in schema else "array"
    return " | ".join(items if each == "array" else each for each in ([types] if isinstance(types, str) else types))


def settings() -> Iterator[str]:
    """The files with a project's settings, and the keys in them."""
    from loraformat.jobs.inputs.settings import Settings

    yield f"files: {', '.join(NAMES)}"
    keys = [each.name for each in dataclasses.fields(Settings) if each.name != "source"]
    yield f"[validate]: {', '.join(keys)}"


def environment() -> Iterator[str]:
    """The variables that the package reads; those of a build are in hatch_build.py."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "loraformat").rglob("*.py"))
    found = {name for text in texts for name in re.findall(r"[\"']LORAFORMAT_[A-Z]+[\"']", text)}
    return iter(sorted(name.strip("\"'") for name in found))


def extras() -> Iterator[str]:
    """The extras that users install."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    developers = {"dev", "diffusers", "engines", "llamacpp", "mutants", "oracles", "release", "test"}
    return iter(sorted(set(re.findall(r"^(\w+) = ", table, re.MULTILINE)) - developers))


def ci() -> Iterator[str]:
    """Inputs and outputs of the action, and the hooks."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    for name, each in action["inputs"].items():
        default = str(each["default"]).split()
        yield f"action input {name} = {' '.join(default)}".rstrip(" =")
    yield from (f"action output {name}" for name in action["outputs"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    yield from (f"hook {each['id']}" for each in hooks)


def python() -> Iterator[str]:
    """Each public name, below a function its arguments, below a class those of its construction and its members."""
    for name in loraformat.__all__:
        value = getattr(loraformat, name)
        if inspect.isclass(value):
            yield from _class(name, value)
        elif inspect.isfunction(value):
            yield f"{name}()"
            yield from (f"    {each}" for each in _arguments(value))
            yield f"    -> {_annotation(inspect.signature(value).return_annotation)}"
        elif get_args(value):
            yield f"{name} = {' | '.join(each.__name__ for each in get_args(value))}"
        else:
            yield f"{name}: {type(value).__name__}"


def _class(name: str, value: type) -> Iterator[str]:
    if issubclass(value, LoraFormatError):
        base = value.__mro__[1].__name__
        yield f"class {name}({base}): {value.code} {value.name}"
    elif issubclass(value, enum.Enum):
        yield f"class {name}: {', '.join(each.name for each in value)}"
    else:
        yield f"class {name}"
        yield from (f"    {each}" for each in _arguments(value))
    for member, each in sorted(_members(value).items()):
        if isinstance(each, property):
            yield f"    .{member}: {_annotation(inspect.signature(each.fget).return_annotation) if each.fget else ''}"
        elif isinstance(each, (classmethod, staticmethod)):
            yield f"    .{member}{_signature(each.__func__, skip=isinstance(each, classmethod))}"
        elif inspect.isfunction(each):
            yield f"    .{member}{_signature(each, skip=True)}"


def _members(value: type) -> dict[str, object]:
    """What a class and those of its bases that are ours define under public names."""
    found: dict[str, object] = {}
    for each in reversed(value.__mro__):
        if each.__module__.startswith("loraformat") and (each is value or not issubclass(value, LoraFormatError)):
            found.update({name: member for name, member in vars(each).items() if not name.startswith("_")})
    return found


def _signature(value: object, *, skip: bool = False) -> str:
    assert callable(value)
    result = _annotation(inspect.signature(value).return_annotation)
    return f"({', '.join(_arguments(value, skip=skip))}) -> {result}"


def _arguments(value: object, *, skip: bool = False) -> Iterator[str]:
    """Each argument with its type and default: a number before those that may be passed by position."""
    assert callable(value)
    for number, each in enumerate(list(inspect.signature(value).parameters.values())[1 if skip else 0 :], 1):
        place = f"{number} " if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) else ""
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        name = f"{place}{stars}{each.name}{'' if each.default is each.empty else '?'}"
        yield f"{name}: {_annotation(each.annotation)}{_value(each.default)}"


def _value(default: object) -> str:
    """A default that every Python spells in the same way."""
    plain = default is None or isinstance(default, (bool, int, float, str))
    return f" = {default!r}" if plain and not isinstance(default, enum.Enum) else ""


def _annotation(annotation: object) -> str:
    """As the source has it, in one line."""
    if annotation is inspect.Parameter.empty:
        return "anything"
    return " ".join(annotation.split()) if isinstance(annotation, str) else getattr(annotation, "__name__", "anything")


def differences(committed: str, now: str) -> tuple[list[str], list[str]]:
    """Lines of the list that are gone, and lines that are new; the line above a line that is indented belongs to it."""
    before, after = set(_named(committed)), set(_named(now))
    return [each for each in _named(committed) if each not in after], [
        each for each in _named(now) if each not in before
    ]


def _named(text: str) -> list[str]:
    found, owner, section = [], "", ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        if not line.startswith("    "):
            owner = line
        found.append(f"{section}: {line if line == owner else f'{owner} > {line.strip()}'}")
    return found


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        gone, new = differences(PAGE.read_text(encoding="utf-8"), text)
        sys.exit(
            "\n".join(
                [
                    "docs/surface.md is not what the package has:",
                    *(f"- {each}" for each in gone),
                    *(f"+ {each}" for each in new),
                ]
            )
        )
