"""The front matter of a card: fields of ours beside those of a person, whose lines stay as they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat.errors import InvalidYaml
from loraformat.jobs.card.escaping import yaml_text
from loraformat.model.bundle import CARD
from loraformat.rules.metadata.card import fields_of, lines_of
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


def parse(text: str) -> Card:
    """A card in its parts. Raises: InvalidYaml (LF009): its front matter is not a mapping of YAML."""
    lines, fields = lines_of(text), dict(fields_of(text))
    if lines is None:
        return Card({}, {}, text)
    blocks: dict[str, list[str]] = {}
    key = ""
    for line in lines:
        match = _KEY.match(line)
        name = match[1].strip("\"'") if match else ""
        key = name if name in fields else key
        blocks.setdefault(key, []).append(line)
    if set(blocks) - {""} != set(fields):
        raise InvalidYaml(
            "the front matter has a form that cannot be edited safely",
            where=CARD,
            hint="write each field on a line of its own: key: value",
        )
    body = "\n".join(text.split("\n")[len(lines) + 2 :])
    return Card({name: tuple(each) for name, each in blocks.items()}, fields, body)


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
    # What an earlier run knew and this one does not stays ours.
    owned = {
        key: digest
        for key, digest in before.items()
        if key not in ours and key in card.fields and digest_of(card.fields[key]) == digest
    }
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
