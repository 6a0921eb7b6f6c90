"""What we have to say about an adapter: findings, their severities, and text that is safe to print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering


@total_ordering
class Severity(Enum):
    """How bad a finding is. `ERROR > WARNING > INFO`."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Severity):
            return NotImplemented
        order = list(Severity)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, loss or oddity of one adapter.

    Attributes:
        code: stable code, `LF` and three digits; what it means is on its page (`loraformat explain CODE`).
        name: the code's name in words, `rank-mismatch`.
        where: file and place in it, as the user would look for it; may be empty.
        message: this occurrence: what was expected and what was found.
        hint: what to do, if we know.
        line: of the file that `where` names, from 1; 0 for unknown.
    """

    code: str
    name: str
    severity: Severity
    where: str
    message: str
    hint: str = ""
    line: int = 0


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings by place, code and message."""
    return tuple(sorted(findings, key=lambda finding: (finding.where, finding.code, finding.message)))


def show(text: object, limit: int = 400) -> str:
    r"""Text from a file or an exception, with nothing in it that a terminal would act on.

    Control characters (C0, DEL, C1), line and paragraph separators, bidirectional and zero-width characters and lone
    surrogates come out as `\xNN` or `\uNNNN`; what is longer than `limit` characters is cut, and it says how much.
    """
    raw = str(text)
    safe = "".join(_escaped(character) for character in raw[:limit])
    return safe if len(raw) <= limit else f"{safe}… ({len(raw) - limit} more characters)"


_INVISIBLE = frozenset(
    [*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF, 0x061C, 0x00AD, 0x180E]
)


def _escaped(character: str) -> str:
    point = ord(character)
    if point < 0x20 or 0x7F <= point <= 0x9F:
        return f"\\x{point:02x}"
    if point in _INVISIBLE or 0xD800 <= point <= 0xDFFF:
        return f"\\u{point:04x}"
    return character
