"""A safetensors header as the safetensors library spells it, read several times as fast as by way of JSON.

What stands here reads a header whole or not at all. Whatever is spelled otherwise, or is wrong, is left to the strict
reader, which finds the same in what both can read and says what is wrong with the rest.

Source: safetensors 0.8.0, tensor.rs: `TensorInfo` is written compactly, its fields in the order of their declaration.
"""

from __future__ import annotations

import re
from typing import NamedTuple

METADATA = "__metadata__"
_MOST_ENTRIES = 1_000_000  # far fewer lists and objects than strict JSON allows
# `re` keeps some hundreds of bytes for each turn of a repeated group: what may repeat has an end.
_MOST_PAIRS = 1_000
MOST_DIMENSIONS = 8

# Printable ASCII but for quote and backslash: nothing that JSON would read as anything but itself.
_TEXT = r'"([ !#-\[\]-~]*)"'
# Below 10**15, so always within what a header may hold.
_NUMBER = r"(?:0|[1-9][0-9]{0,14})"
_PAIR = re.compile(f"{_TEXT}:{_TEXT}(?:,|$)")
_START = re.compile(rf'\{{(?:"{METADATA}":\{{((?:{_TEXT}:{_TEXT}(?:,(?=")|(?=\}}))){{0,{_MOST_PAIRS}}})\}},)?')
_ENTRY = re.compile(
    rf'{_TEXT}:\{{"dtype":"([A-Z0-9_]+)","shape":\[((?:{_NUMBER}(?:,{_NUMBER}){{0,{MOST_DIMENSIONS - 1}}})?)\],'
    rf'"data_offsets":\[({_NUMBER}),({_NUMBER})\]\}}(?:,|\}} *\Z)'
)


class PlainHeader(NamedTuple):
    """The parts of a header as text; sizes and offsets are decimal numbers.

    Attributes:
        entries: name, dtype, sizes with commas between them, first and last offset; no name stands twice.
    """

    metadata: dict[str, str]
    entries: list[tuple[str, ...]]


def read_plain(header: bytes) -> PlainHeader | None:
    """The parts of a header that is spelled as the library does it, or None."""
    try:
        text = header.decode("ascii")
    except UnicodeDecodeError:
        return None
    start = _START.match(text)
    pairs = _PAIR.findall(start[1]) if start and start[1] else []
    entries = _entries(text, start.end()) if start else None
    if entries is None or len(dict(pairs)) != len(pairs):
        return None
    return PlainHeader(dict(pairs), entries)


def _entries(text: str, position: int) -> list[tuple[str, ...]] | None:
    """All entries from a position on, where nothing else stands between them and the end."""
    found: list[tuple[str, ...]] = []
    for match in _ENTRY.finditer(text, position):
        if match.start() != position:
            return None
        position = match.end()
        found.append(match.groups())
    is_whole = position == len(text) and text.rstrip(" ").endswith("}}")
    names = {entry[0] for entry in found}
    return found if is_whole and METADATA not in names and len(names) == len(found) <= _MOST_ENTRIES else None
