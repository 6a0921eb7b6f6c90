"""Strict YAML: only plain values, without tags, anchors or aliases."""

from __future__ import annotations

import math

import yaml

from loraformat.diagnostics import FindingLocation, show
from loraformat.errors import InvalidYaml
from loraformat.strict_json import Json

DEEPEST = 64
MOST_NBYTES = 1 << 20
MOST_VALUES = 100_000
MOST_DIGITS = 64  # of a number; PyYAML computes those to the base of sixty in quadratic time


def parse(data: bytes, where: str) -> Json:
    """The value that a YAML text stands for, as JSON has it.

    Args:
        data: one document in UTF-8, at most 1 MiB.
        where: name of the file, for messages.

    Raises: InvalidYaml (LF009): a fault of syntax, a tag, an anchor, an alias, a key twice, a value that JSON does not
        have, a number of more than 64 characters, a lone surrogate, more than 64 levels or 100,000 values.
    """
    if len(data) > MOST_NBYTES:
        raise InvalidYaml(f"{len(data)} bytes, at most {MOST_NBYTES} are read", where=where)
    try:
        _check_events(data, where)
        node = yaml.compose(data, Loader=yaml.SafeLoader)
        return None if node is None else _value(node, where)
    # PyYAML lets through what int() and chr() say of numbers in directives and escapes.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        said = show(str(error).replace("\n", " "), 200)
        raise InvalidYaml(f"not valid YAML: {said}", where=where) from error


def _check_events(data: bytes, where: str) -> None:
    """Before anything is built: depth, number, and nothing that refers to something else."""
    depth = 0
    for count, event in enumerate(yaml.parse(data, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or count > MOST_VALUES:
            raise InvalidYaml(f"more than {DEEPEST} levels or {MOST_VALUES} values", where=where)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InvalidYaml(f"{_line(event)}anchors and aliases are not supported", where=_in_line(event, where))
        if getattr(event, "tag", None):
            raise InvalidYaml(f"{_line(event)}tags are not supported", where=_in_line(event, where))


def _line(marked: yaml.Event | yaml.Node) -> str:
    return "" if marked.start_mark is None else f"line {marked.start_mark.line + 1}: "


def _in_line(marked: yaml.Event | yaml.Node, where: str) -> FindingLocation:
    return FindingLocation(file=where, line=0 if marked.start_mark is None else marked.start_mark.line + 1)


def _value(node: yaml.Node, where: str) -> Json:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, where) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float", "bool"):
        return _number(node, kind, where)
    if kind == "null":
        return None
    return _checked_text(node, where)


def _checked_text(node: yaml.ScalarNode, where: str) -> str:
    """Raises: InvalidYaml: an escape made a lone surrogate, which no encoding can write."""
    text = str(node.value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidYaml(f"{_line(node)}a lone surrogate", where=_in_line(node, where)) from error
    return text


def _mapping(node: yaml.MappingNode, where: str) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in found:
            raise InvalidYaml(f"{_line(key)}a key is not a string, or appears twice", where=_in_line(key, where))
        found[_checked_text(key, where)] = _value(item, where)
    return found


def _number(node: yaml.ScalarNode, kind: str, where: str) -> Json:
    if len(node.value) > MOST_DIGITS:
        message = f"{_line(node)}a number of {len(node.value)} characters, at most {MOST_DIGITS} are read"
        raise InvalidYaml(message, where=_in_line(node, where))
    constructor = yaml.SafeLoader("")
    build = {
        "int": constructor.construct_yaml_int,
        "float": constructor.construct_yaml_float,
        "bool": constructor.construct_yaml_bool,
    }[kind]
    try:
        value = build(node)
    except (ValueError, OverflowError) as error:
        raise InvalidYaml(f"{_line(node)}not a supported number", where=_in_line(node, where)) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidYaml(f"{_line(node)}a number that is not finite", where=_in_line(node, where))
    assert isinstance(value, (bool, int, float))
    return value
