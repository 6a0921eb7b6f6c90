"""Lines and aligned tables from plain cells, cut to a width and safe to print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraformat.diagnostics import Finding, Severity, show

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold blue"}
_GAP = 2
_NARROWEST = 20
_WIDEST = 44  # that a first column may take from the others so that no two names look the same


@dataclass(frozen=True, slots=True)
class Styled:
    """Text with a style of its own; made safe already or by `Page`."""

    text: str
    style: str = ""


Line = tuple[Styled, ...]


@dataclass(slots=True)
class Page:
    """Lines in the making.

    Attributes:
        width: columns of the terminal; None where nothing is cut.
    """

    width: int | None = None
    lines: list[Line] = field(default_factory=list)

    def say(self, *pieces: Styled | str) -> None:
        """A line; plain strings have no style."""
        self.lines.append(_safe(pieces))

    def flow(self, *pieces: Styled | str, indent: int = 4) -> None:
        """A line that is broken between words where the width has no place for it; what follows is indented."""
        line: list[Styled] = []
        used = 0
        for part in _safe(pieces):
            for word in re.findall(r" *[^ ]+ ?| +", part.text):
                if self.width is not None and used > indent and used + columns_of(word.rstrip()) > self.width:
                    line[-1] = Styled(line[-1].text.rstrip(), line[-1].style)
                    self.lines.append(tuple(line))
                    line, used, word = [Styled(" " * indent)], indent, word.lstrip()  # noqa: PLW2901
                line.append(Styled(word, part.style))
                used += columns_of(word)
        self.lines.append(tuple(line))

    def fact(self, label: str, value: str) -> None:
        """A line of the block under the title: label, then value, aligned with its neighbors."""
        self.flow("  ", Styled(f"{label:<11}", "dim"), value, indent=13)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns: the first is a name (left, cut in the middle), a column of numbers stands to the right."""
        if not rows:
            return
        cells = [[show(cell, limit=4000) for cell in row] for row in (head, *rows)]
        widths = [max(columns_of(row[at]) for row in cells) for at in range(len(head))]
        if self.width is not None:
            rest = sum(widths[1:]) + _GAP * len(widths)
            widths[0] = min(widths[0], max(_NARROWEST, self.width - rest))
        right = [at > 0 and all(_is_number(row[at]) for row in cells[1:]) for at in range(len(head))]
        for number, row in enumerate(cells):
            row[0] = shorten(row[0], widths[0])
            parts = [_aligned(cell, width, to_right) for cell, width, to_right in zip(row, widths, right, strict=True)]
            text = (" " * _GAP).join(parts).rstrip()
            self.lines.append((Styled("  "), Styled(text, "" if number else "dim")))

    def fitted_table(self, head: Sequence[str], rows: Sequence[Sequence[str]], dispensable: Sequence[str]) -> None:
        """A table without columns that the width has no place for, of `dispensable` in that order; they are named."""
        kept, left_out = list(range(len(head))), []
        narrowest = _NARROWEST if self.width is None else _least_width([row[0] for row in (head, *rows)])
        for name in dispensable:
            if self._holds([[row[at] for at in kept] for row in (head, *rows)], narrowest):
                break
            if name in head:
                kept.remove(head.index(name))
                left_out.append(name)
        self.table([head[at] for at in kept], [[row[at] for at in kept] for row in rows])
        if left_out and rows:
            told = f"not shown for lack of width: {', '.join(left_out)} (use a wider terminal, or --format json)"
            self.flow(Styled(f"  {told}", "dim"), indent=2)

    def _holds(self, rows: Sequence[Sequence[str]], narrowest: int) -> bool:
        """Whether a table fits the width, its first column cut down to `narrowest`."""
        if self.width is None:
            return True
        widths = [max(columns_of(row[at]) for row in rows) for at in range(len(rows[0]))]
        return min(widths[0], narrowest) + sum(widths[1:]) + _GAP * len(widths) <= self.width

    def finding(self, finding: Finding) -> None:
        """`where: error[LF202] message`, and the hint below it."""
        where = f"{finding.where}: " if finding.where else ""
        label = Styled(f"{finding.severity.value}[{finding.code}]", STYLES[finding.severity])
        self.say(where, label, f" {finding.message}")
        if finding.hint:
            self.say("  ", Styled("hint:", "cyan"), f" {finding.hint}")


def _safe(pieces: Sequence[Styled | str]) -> Line:
    parts = (Styled(piece) if isinstance(piece, str) else piece for piece in pieces)
    return tuple(Styled(show(part.text, limit=4000), part.style) for part in parts)


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns: its middle gives way, for both ends of a dotted path say most."""
    if columns_of(text) <= width:
        return text
    if width < 5:
        return text[: max(width, 0)]
    head = (width - 3) // 2
    # A wide character takes two columns, so what is kept may have to be shorter than counted.
    tail = width - 3 - head
    while columns_of(text[:head]) + 3 + columns_of(text[-tail:]) > width and head:
        head, tail = head - 1, max(tail - 1, 1)
    return f"{text[:head]}...{text[-tail:]}"


def _least_width(names: Sequence[str]) -> int:
    """The least width at which names that differ look different when they are cut."""
    different = set(names)
    widths = range(_NARROWEST, _WIDEST)
    return next((w for w in widths if len({shorten(name, w) for name in different}) == len(different)), _WIDEST)


def columns_of(text: str) -> int:
    """How many terminal columns the text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(character) else 1 + (east_asian_width(character) in "WF") for character in text)


def _aligned(text: str, width: int, to_right: bool) -> str:
    space = " " * (width - columns_of(text))
    return space + text if to_right else text + space


def _is_number(cell: str) -> bool:
    return not cell or cell in ("-", "?") or cell[0].isdigit() or (cell[0] == "-" and cell[1].isdigit())
