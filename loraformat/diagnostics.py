"""Findings about an adapter, their severities, and text that is safe to print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import total_ordering


@total_ordering
class Severity(Enum):
    """The severity of a finding: `ERROR > WARNING > INFO`."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Severity):
            return NotImplemented
        order = list(Severity)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingLocation:
    """What a finding or an error is about. Its text, `adapter_config.json: rank_pattern["q_proj"]`, is for people.

    Attributes:
        subject: an option, a verb or the URI of an adapter, if it is neither a file nor a tensor.
        file: name of a file, relative to the folder of the adapter or of the base.
        path: keys and indices of a value inside the file's JSON, YAML or metadata.
        tensor: name of a tensor, of a weight of the base, or of a module.
        more: how many other files or tensors have the same finding.
        line: of the file, from 1; 0 for unknown.
    """

    subject: str = ""
    file: str = ""
    path: tuple[str | int, ...] = ()
    tensor: str = ""
    more: int = 0
    line: int = 0

    @property
    def pointer(self) -> str:
        """The path as a JSON pointer (RFC 6901): `/rank_pattern/q_proj`."""
        return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in self.path)

    @property
    def inside(self) -> str:
        """The part of the file: `rank_pattern["q_proj"]`, or the name of a tensor; "" for the whole file."""
        parts = [self.subject, json_path(self.path), self.tensor and with_more(self.tensor, self.more)]
        return ": ".join(part for part in parts if part)

    def at(self, *path: str | int) -> FindingLocation:
        """The location of a value below this one."""
        return replace(self, path=(*self.path, *path))

    def __str__(self) -> str:
        file = self.file and with_more(self.file, 0 if self.tensor else self.more)
        parts = [self.subject, file, replace(self, subject="").inside]
        return ": ".join(part for part in parts if part)


NOWHERE = FindingLocation()


def in_file(file: str, *path: str | int) -> FindingLocation:
    """A file, or a value inside it: `in_file("adapter_config.json", "rank_pattern", "q_proj")`."""
    return FindingLocation(file=file, path=path)


def in_weights(tensor: str, *, file: str = "", more: int = 0) -> FindingLocation:
    """A tensor, a weight of the base or a module, and how many more the same is said of."""
    return FindingLocation(file=file, tensor=tensor, more=more)


def json_path(path: Iterable[str | int]) -> str:
    """Keys and indices as people write them: `layers_to_transform[0]`, `rank_pattern["q_proj"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif text:
            text += f'["{part}"]'
        else:
            text = part if _PLAIN_KEY.fullmatch(part) else f'"{part}"'
    return text


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    return with_more(", ".join(names[:limit]), max(0, len(names) - limit))


def with_more(name: str, more: int) -> str:
    """A name, and how many more there are: `q_proj and 3 more`."""
    return f"{name} and {more} more" if more else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A fault, loss or oddity of an adapter.

    Attributes:
        code: stable code, `LF` and three digits; `loraformat explain CODE` prints its page.
        name: the code's name in words, `rank-mismatch`.
        location: what it is about.
        message: this occurrence: what is wrong, what was expected and what was found.
        hint: what to do, if known.
        forgivable: whether `--force` downgrades the error to a warning in verbs that write.
    """

    code: str
    name: str
    severity: Severity
    location: FindingLocation
    message: str
    hint: str = ""
    forgivable: bool = False

    @property
    def where(self) -> str:
        """The location as text; may be empty."""
        return str(self.location)

    def record(self) -> dict[str, str | int]:
        """The finding as JSON has it."""
        return {
            "code": self.code,
            "name": self.name,
            "severity": self.severity.value,
            "where": self.where,
            "file": self.location.file,
            "pointer": self.location.pointer,
            "tensor": self.location.tensor,
            "line": self.location.line,
            "message": self.message,
            "hint": self.hint,
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings by place, code and message."""
    return tuple(sorted(findings, key=lambda finding: (finding.where, finding.code, finding.message)))


def show(text: object, limit: int = 400) -> str:
    r"""Text from a file or an exception, with nothing in it that a terminal, a log or a CI system would act on.

    Every report and every message on stderr passes its foreign text through here, and only here is decided what is
    escaped. What does not print, or prints as nothing (controls, marks of direction, zero-width characters, tags,
    noncharacters, lone surrogates), comes out as `\xNN`, `\uNNNN` or `\UNNNNNNNN`. `##` and `::`, with which commands
    of GitHub, Azure and TeamCity begin, are parted by a backslash wherever they stand. What is longer than `limit`
    characters is cut, and it says how much.
    """
    raw = str(text)
    kept = raw if len(raw) <= limit else raw[:limit]
    if not (kept.isascii() and kept.isprintable()):
        kept = "".join(character if _is_visible(character) else _escaped(character) for character in kept)
    safe = _COMMAND.sub(r"\g<0>\\", kept)
    return safe if len(raw) <= limit else f"{safe}… ({len(raw) - limit} more characters)"


def show_address(text: str) -> str:
    """As `show`, without a user, password or query, which may be secret.

    >>> show_address("https://user:secret@host/path?sig=secret")
    'https://…@host/path?…'
    """
    kept, mark, _ = text.partition("?")
    return show(_USER.sub(r"\1…@", kept)) + (f"{mark}…" if mark else "")


_VERBS = {"is": "are", "was": "were", "has": "have", "does": "do"}


def counted(count: int, noun: str, verb: str = "") -> str:
    """A count with a noun, and a verb, that agree with it: "1 weight is", "2 weights are"."""
    words = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
    if not verb:
        return words
    return f"{words} {verb if count == 1 else _VERBS[verb]}"


def counted_of(count: int, total: int, noun: str, verb: str = "is") -> str:
    """A part of a number of things, and a verb that agrees with it: "1 of 2 rows is", "2 of 2 rows are"."""
    return f"{count} of {counted(total, noun)} {verb if count == 1 else _VERBS[verb]}"


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """`did you mean peft? `, the one of `names` that is most like a text; "" where none is."""
    near = closest(text, names)
    return f"did you mean {near}? " if near else ""


def closest(text: str, names: Iterable[str], least: float = 0.5) -> str:
    """The one of `names` that is most like a text, its case ignored; "" where none is.

    >>> closest("ggml", ["gguf", "mlx"]), closest("frobnicate", ["ablate", "merge"])
    ('gguf', '')

    Args: least: how similar they must be, from 0 to 1.

    Who mistypes a name seldom mistypes its first letter: names with another one must be much more like it.
    """
    from difflib import get_close_matches

    asked = text[:_LONGEST_ASKED].lower()
    every = {name.lower(): name for name in names}
    same = [name for name in every if name[:1] == asked[:1]]
    near = get_close_matches(asked, same, 1, least) or get_close_matches(asked, list(every), 1, 0.7)
    return every[near[0]] if near else ""


def json_text(value: object, *, indent: int | None = None, is_compact: bool = False) -> str:
    r"""A value as JSON text in ASCII, sorted, the same bytes for the same value; no CI system finds a command in it.

    `##` and `::` are spelled with an escape of JSON, so that they read back as they were. A lone surrogate, which no
    other reader takes, reads back as the six characters `\udNNN`, as `show` spells it.
    """
    separators = (",", ":") if is_compact else None
    text = json.dumps(value, indent=indent, separators=separators, sort_keys=True, ensure_ascii=True, allow_nan=False)
    if "\\ud" in text:
        text = _SURROGATES.sub(lambda found: f"\\{found[0]}" if found[1] else found[0], text)
    return _COMMAND.sub(_spelled, text) if _COMMAND.search(text) else text


_LONGEST_ASKED = 60
_PLAIN_KEY = re.compile(r"[^\s\"<>]+")

# The actions/runner takes `::name::` at the start of a line and `##[name]` anywhere in it, Azure's agent `##vso[name]`
# anywhere (ActionCommand.cs, Command.cs), TeamCity `##teamcity[name]`. A line may start with any name.
# What stands before the host of an address, also where a slash of it was lost.
_USER = re.compile(r"(:/{1,2})[^/\s]*@")
_COMMAND = re.compile("#(?=#)|:(?=:)")
# A backslash that is escaped, a pair, or one half of a pair, as json.dumps spells them.
_SURROGATES = re.compile(r"\\\\|\\ud[89ab]..\\ud[c-f]..|(\\ud[89a-f]..)")
# Characters that count as printable and show nothing: joiners, fillers, variation selectors, an empty Braille cell.
_BLANK = frozenset(
    map(
        chr,
        [
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *range(0x180B, 0x1810),
            *range(0xFE00, 0xFE10),
            *range(0xE0100, 0xE01F0),
        ],
    )
)


def _spelled(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _is_visible(character: str) -> bool:
    return character.isprintable() and character not in _BLANK


def _escaped(character: str) -> str:
    point = ord(character)
    if point <= 0xFF:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"
