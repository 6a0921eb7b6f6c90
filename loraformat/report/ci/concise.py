"""A line for each finding, and one for the verdict: for editors, hooks and grep."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import show
from loraformat.report.base import Report
from loraformat.report.words import counts, plural


def render(reports: Sequence[Report]) -> str:
    """`ADAPTER: WHERE: error[LF202] message`, then how much was found in all."""
    lines = []
    for report in reports:
        for finding in report.findings:
            where = f"{show(finding.where)}: " if finding.where else ""
            label = f"{finding.severity.value}[{finding.code}]"
            lines.append(f"{show(report.subject)}: {where}{label} {show(finding.message)}")
    lines.append(totals(reports))
    return "\n".join(lines) + "\n"


def totals(reports: Sequence[Report]) -> str:
    """How many adapters were checked, and what was found."""
    found = counts([finding for report in reports for finding in report.findings])
    return f"{plural(len(reports), 'adapter')}: {found or 'OK'}"
