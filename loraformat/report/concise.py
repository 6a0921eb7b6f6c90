"""A line for each finding, and one for the verdict: for editors, hooks and grep."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import Severity, show
from loraformat.report.base import Report
from loraformat.report.words import amount, at_line_start, plural


def render(reports: Sequence[Report]) -> str:
    """`ADAPTER: WHERE: error[LF202] message`, then how much was found in all."""
    lines = []
    for report in reports:
        for finding in report.findings:
            where = f"{show(finding.where)}: " if finding.where else ""
            label = f"{finding.severity.value}[{finding.code}]"
            lines.append(f"{at_line_start(show(report.subject))}: {where}{label} {show(finding.message)}")
    lines.append(totals(reports))
    return "\n".join(lines) + "\n"


def totals(reports: Sequence[Report]) -> str:
    """How many adapters were checked, and what was found."""
    words = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
    found = [finding.severity for report in reports for finding in report.findings]
    counts = [plural(found.count(severity), word) for severity, word in words.items() if severity in found]
    return f"{amount(len(reports))} {'adapter' if len(reports) == 1 else 'adapters'}: {', '.join(counts) or 'OK'}"
