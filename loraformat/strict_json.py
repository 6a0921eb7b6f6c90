"""Strict JSON: refuses what Python's parser accepts but others do not."""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn, TypeAlias, Union

from loraformat.diagnostics import FindingLocation, show
from loraformat.errors import InvalidJson

Json: TypeAlias = Union[bool, int, float, str, "list[Json]", "dict[str, Json]", None]

DEEPEST = 64
MOST_DIGITS = 20
MOST_CONTAINERS = 4_000_000  # lists and objects; as Python values they take some hundred times the bytes of `{},`

# A string without escapes, ended or not: always a match from a quote on, so the scan is linear. A repeated group, as
# escapes would need, takes some hundred bytes of memory for each turn.
_STRING = re.compile(rb'"[^"]*"?')
_STRING_OR_BRACKET = re.compile(_STRING.pattern + rb"|[\[\]{}]")
_LONG_INTEGER = re.compile(rb"[0-9]{%d}" % (MOST_DIGITS + 1))
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(Exception):
    """What a hook of the parser found; never leaves this module."""


def parse(data: bytes, where: str, *, limit: int = 1 << 20) -> Json:
    """The value that a JSON text stands for.

    Args:
        data: UTF-8, without a byte-order mark.
        where: name of the file, for messages.
        limit: most bytes.

    Raises: InvalidJson: any fault of syntax, a repeated key, NaN or Infinity, a float beyond the range of doubles, an
        integer of more than 20 digits, more than 64 levels, a lone surrogate, more than `limit` bytes.
    """
    if len(data) > limit:
        raise InvalidJson(f"{len(data)} bytes, at most {limit} are read", where=where)
    text = _decoded(data, where)
    _check_nesting(data, where)
    try:
        value: Json = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            # A call for each integer is a tenth of the time of a large header; most texts have no long one at all.
            parse_int=_integer if _LONG_INTEGER.search(data) else None,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        raise InvalidJson(
            f"line {error.lineno}, column {error.colno}: {_said(error)}", where=_in_line(where, error.lineno)
        ) from error
    except _Refused as error:
        raise InvalidJson(str(error), where=where) from error
    except RecursionError as error:
        raise InvalidJson(f"nested deeper than {DEEPEST} levels", where=where) from error
    except MemoryError as error:
        raise InvalidJson("does not fit into memory", where=where) from error
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value, where)
    return value


def dump(value: Json) -> bytes:
    """JSON in the one form in which this package writes it: sorted keys, ASCII, two spaces, a newline at the end."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, indent=2, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _decoded(data: bytes, where: str) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise InvalidJson(
            "begins with a byte-order mark", where=where, hint="save it as UTF-8 without a byte-order mark"
        )
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidJson("UTF-16, expected UTF-8", where=where, hint="save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _place(data, error.start)
        raise InvalidJson(f"line {line}, column {column}: not UTF-8", where=_in_line(where, line)) from error


def _place(data: bytes, offset: int) -> tuple[int, int]:
    before = data[:offset]
    return before.count(b"\n") + 1, offset - (before.rfind(b"\n") + 1) + 1


def _check_nesting(data: bytes, where: str) -> None:
    # The same length, so that places stay; pairs from the left on, as a reader of strings takes them.
    plain = data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ") if b"\\" in data else data
    brackets = _STRING.sub(b"", plain).translate(None, _NOT_BRACKETS)
    if len(brackets) > 2 * MOST_CONTAINERS:
        raise InvalidJson(f"more than {MOST_CONTAINERS} lists and objects", where=where)
    for _ in range(DEEPEST):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if not brackets:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(plain):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > DEEPEST:
            line, column = _place(data, match.start())
            raise InvalidJson(
                f"line {line}, column {column}: nested deeper than {DEEPEST} levels", where=_in_line(where, line)
            )


def _in_line(where: str, line: int) -> FindingLocation:
    return FindingLocation(file=where, line=line)


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f'the key "{show(key, 200)}" appears twice in one object')
            seen.add(key)
    return value


def _constant(word: str) -> NoReturn:
    raise _Refused(f"{word} is not JSON")


def _integer(digits: str) -> int:
    count = len(digits) - digits.startswith("-")
    if count > MOST_DIGITS:
        raise _Refused(f"an integer of {count} digits, at most {MOST_DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"{show(digits, 40)} is beyond the range of a double")
    return value


def _said(error: json.JSONDecodeError) -> str:
    return error.msg[:1].lower() + error.msg[1:]


def _check_surrogates(value: Json, where: str) -> None:
    pending: list[Json] = [value]
    while pending:
        found = pending.pop()
        if isinstance(found, str):
            try:
                found.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidJson(f'a lone surrogate in "{show(found, 200)}"', where=where) from error
        elif isinstance(found, list):
            pending.extend(found)
        elif isinstance(found, dict):
            pending.extend(found)
            pending.extend(found.values())
