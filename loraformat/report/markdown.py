"""A summary in Markdown, for the page of a CI run or a comment."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from loraformat.diagnostics import Finding, Severity, show
from loraformat.report.base import Report
from loraformat.report.concise import totals
from loraformat.report.words import plural

_MOST_ROWS = 200
_MARKS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~@])")


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
    """Text from a file as plain text: no HTML, no links, no mentions, no end of a cell."""
    return _SPECIAL.sub(r"\\\1", html.escape(show(text), quote=False))
