"""A summary in Markdown, for the page of a CI run or a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraformat.diagnostics import Finding, Severity, show
from loraformat.report.base import Report
from loraformat.report.ci.concise import totals
from loraformat.report.words import plural

_MOST_ROWS = 200
_MARKS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_PIPE = re.compile(r"(\\*)\|")


def render(reports: Sequence[Report]) -> str:
    """A heading with the verdict, and a table of findings for each adapter that has some."""
    tables = [_table(report) for report in reports if report.findings]
    return "\n\n".join([f"### loraformat: {totals(reports)}", *tables]) + "\n"


def _table(report: Report) -> str:
    lines = [f"**{_text(report.subject)}**", "", "| | code | where | what |", "|---|---|---|---|"]
    lines += [_row(finding) for finding in report.findings[:_MOST_ROWS]]
    rest = len(report.findings) - _MOST_ROWS
    return "\n".join([*lines, *(["", f"and {plural(rest, 'more finding')}"] if rest > 0 else [])])


def _row(finding: Finding) -> str:
    hint = f"<br>{_text(finding.hint)}" if finding.hint else ""
    name = f"{finding.code} {finding.name}"
    return f"| {_MARKS[finding.severity]} | {name} | {_text(finding.where)} | {_text(finding.message)}{hint} |"


def _text(text: str) -> str:
    """Text from a file as a code span: in it GitHub and GitLab see no HTML, link, address, mention or reference.

    A backslash before `@` or `://` would not do: mentions and bare addresses are looked for after escapes are undone.
    """
    shown = show(text)
    if not shown.strip():
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{_PIPE.sub(_in_a_cell, shown)}{space}{fence}"


def _in_a_cell(found: re.Match[str]) -> str:
    """Backslashes and a pipe that does not end the cell: cells are parted first, two backslashes counting as one."""
    slashes = found[1]
    return f"{slashes}{chr(92) * (len(slashes) % 2)}\\|"
