"""The front matter of a card: fields of ours beside those of a person, whose lines stay as they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat import strict_yaml
from loraformat.errors import InvalidYaml
from loraformat.jobs.card.escaping import yaml_text
from loraformat.strict_json import Json

_KEY = re.compile(r"""("[^"]+"|'[^']+'|[^\s#"'\-][^:]*?)\s*:(?:\s|$)""")
# Lists to which a person may have added something.
_UNITED = ("tags",)


@dataclass(frozen=True, slots=True)
class Card:
    """A card in its parts.

    Attributes:
        blocks: the front matter by top-level field, in order: key → its lines; "" for what stands before the first.
        fields: its values.
        body: all after it.
    """

    blocks: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, Json]
    body: str


def parse(text: str, where: str = "README.md") -> Card:
    """A card in its parts. Raises: InvalidYaml (LF009): its front matter is not a mapping of YAML."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if not lines or lines[0].rstrip() != "---" or end is None:
        return Card({}, {}, text)
    found = strict_yaml.parse("\n".join(lines[1:end]).encode("utf-8", "replace"), where)
    if found is not None and not isinstance(found, dict):
        raise InvalidYaml("the front matter is not a mapping", where=where, hint="write `key: value` lines")
    fields: dict[str, Json] = found or {}
    blocks: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:end]:
        match = _KEY.match(line)
        name = match[1].strip("\"'") if match else ""
        key = name if name in fields else key
        blocks.setdefault(key, []).append(line)
    if set(blocks) - {""} != set(fields):
        raise InvalidYaml(
            "the front matter is written in a form that cannot be added to",
            where=where,
            hint="write each field in a line of its own: key: value",
        )
    body = "\n".join(lines[end + 1 :])
    return Card({name: tuple(each) for name, each in blocks.items()}, fields, body + "\n" if body else "")


def digest_of(value: Json) -> str:
    """What a value is known by in the next run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def merged(card: Card, ours: Mapping[str, Json], before: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The lines of a front matter, and which of its fields are ours: key → digest.

    A field that a person set, or changed since an earlier run wrote it, stays.

    Args:
        card: what is there.
        ours: the fields of this run.
        before: those that an earlier run wrote.
    """
    blocks = dict(card.blocks)
    owned: dict[str, str] = {}
    for key in [key for key, digest in before.items() if key not in ours and key in card.fields]:
        if digest_of(card.fields[key]) == before[key]:
            del blocks[key]
    for key, value in ours.items():
        there = card.fields.get(key)
        is_theirs = key in card.fields and before.get(key) != digest_of(there)
        if is_theirs and not (key in _UNITED and isinstance(there, list) and isinstance(value, list)):
            continue
        if is_theirs:
            assert isinstance(there, list)
            assert isinstance(value, list)
            missing = [each for each in value if each not in there]
            if missing:
                blocks[key] = emitted(key, [*there, *missing])
            continue
        blocks[key] = emitted(key, value)
        owned[key] = digest_of(value)
    return [line for lines in blocks.values() for line in lines], owned


def emitted(key: str, value: Json) -> tuple[str, ...]:
    """The lines of a field: text, or a list of texts."""
    if isinstance(value, list) and value:
        return (f"{key}:", *(f"- {_scalar(each)}" for each in value))
    return (f"{key}: {_scalar(value)}",)


def _scalar(value: Json) -> str:
    return yaml_text(value) if isinstance(value, str) else json.dumps(value)


def texts(value: Json) -> Sequence[str]:
    """A field that holds a text, or several."""
    found = value if isinstance(value, list) else [value]
    return [each for each in found if isinstance(each, str)]
