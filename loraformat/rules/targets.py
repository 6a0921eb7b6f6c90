"""The programs that load adapters, as a table: what they refuse and what they leave out in silence, by version.

The table is runtimes.json. Each line has the code of the rule that finds the feature, a verdict ("refuses" or
"ignores"), the message that the program gives or what it does instead, what helps, its source, and the versions that
it holds for (`from`, `before`). A feature without a line loads as it should, as far as is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that a runtime cannot do.

    Attributes:
        rule: code of the rule that looks for it.
        verdict: "refuses" or "ignores".
        message: what the runtime says, or does instead.
        since, before: first version it holds for, and the first that it does not; "" for no bound.
        allowed: modules that are no fault in spite of it.
        formats: names of the formats that it is about; () for all.
    """

    rule: str
    verdict: str
    message: str
    help: str
    source: str
    since: str = ""
    before: str = ""
    allowed: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime at a version.

    Attributes:
        name: as in `--target`.
        version: the one asked for, else the newest that the table was made from.
        reads: names of the formats that it loads.
        default_rank, most_rank: greatest rank without and with settings; None for no known limit.
        rank_option: how a greater rank is allowed; ranks: the values that it takes, () for any.
        modules: last names of the modules that it adapts; () for all.
        settings, kinds: for PEFT: setting or `peft_type` → version that brought it.
    """

    name: str
    title: str
    version: str
    reads: tuple[str, ...]
    lines: tuple[Line, ...]
    default_rank: int | None = None
    most_rank: int | None = None
    rank_option: str = ""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    settings: Mapping[str, str] | None = None
    kinds: Mapping[str, str] | None = None

    @property
    def label(self) -> str:
        """Its title and version: vLLM 0.33.0."""
        return f"{self.title} {self.version}".rstrip()

    def lines_for(self, rule: str, format_name: str = "") -> Iterator[Line]:
        """What the table says about the feature that a rule looks for, at this version.

        Args: format_name: of the adapter; "" for lines about any.
        """
        own = key_of(self.version)
        for line in self.lines:
            is_late = bool(line.since) and own < key_of(line.since)
            is_early = bool(line.before) and own >= key_of(line.before)
            is_other = bool(format_name) and bool(line.formats) and format_name not in line.formats
            if line.rule == rule and not is_late and not is_early and not is_other:
                yield line

    def setting_for(self, rank: int) -> int:
        """The least value of `rank_option` that allows a rank."""
        return next((each for each in self.ranks if each >= rank), rank)

    def lacks(self, since: str | None) -> bool:
        """Whether something that came with version `since` is missing at this version."""
        return since is None or (bool(since) and key_of(self.version) < key_of(since))


def names() -> tuple[str, ...]:
    """The runtimes of the table."""
    return tuple(sorted(_table()))


def parse(text: str) -> Target:
    """`NAME`, `NAME==VERSION` or `NAME>=VERSION` (the least that is to be served) as a target.

    Raises: ValueError: no such runtime, or no version.
    """
    found = re.fullmatch(r"\s*([A-Za-z][\w.\-]*?)\s*(?:[=>]=\s*([0-9][0-9a-z.\-]{0,30}))?\s*", text)
    if found is None or found[1].lower() not in _table():
        raise ValueError(f"expected one of {', '.join(names())}, perhaps with ==VERSION")
    return _target(found[1].lower(), found[2])


def key_of(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d{1,9}", version)[:3])


def _target(name: str, version: str | None) -> Target:
    row = _table()[name]
    return Target(
        name=name,
        title=row["title"],
        version=version or row["newest"],
        reads=tuple(row["reads"]),
        lines=tuple(_line(line) for line in row["lines"]),
        default_rank=row.get("default_rank"),
        most_rank=row.get("most_rank"),
        rank_option=row.get("rank_option", ""),
        ranks=tuple(row.get("ranks", ())),
        modules=tuple(row.get("targets", ())),
        settings=row.get("fields"),
        kinds=row.get("kinds"),
    )


def _line(row: Mapping[str, Any]) -> Line:
    return Line(
        rule=row["rule"],
        verdict=row["verdict"],
        message=row["message"],
        help=row["help"],
        source=row["source"],
        since=row.get("from", ""),
        before=row.get("before", ""),
        allowed=tuple(row.get("allowed", ())),
        formats=tuple(row.get("formats", ())),
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    from pathlib import Path

    text = Path(__file__).with_name("runtimes.json").read_text(encoding="utf-8")
    table = json.loads(text)
    assert isinstance(table, dict)
    return table
