"""Annotations of GitHub Actions: at most ten of a kind, since more are not shown; the same findings share one.

Source: docs.github.com, Actions, "Workflow commands"; github.com/orgs/community/discussions/26680.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraformat.diagnostics import Finding, Severity, show
from loraformat.report.base import Report
from loraformat.report.ci.concise import totals
from loraformat.report.ci.places import place_of

MOST = 10
_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(reports: Sequence[Report]) -> str:
    """`::error file=…,line=…,title=…::message`, errors first, and a line that says how much was found in all."""
    groups: dict[tuple[Severity, int, str], list[Finding]] = {}
    for number, report in enumerate(reports):
        for finding in report.findings:
            groups.setdefault((finding.severity, number, finding.code), []).append(finding)
    lines: list[str] = []
    for severity, command in _COMMANDS.items():
        members = [(reports[key[1]], found) for key, found in groups.items() if key[0] is severity]
        shown = members if len(members) <= MOST else members[: MOST - 1]
        lines += [_annotation(command, report, found) for report, found in shown]
        if len(members) > len(shown):
            rest = sum(len(found) for _, found in members[len(shown) :])
            lines.append(f"::{command} title=loraformat::{rest} more; the report lists all of them")
    return "\n".join([*lines, totals(reports)]) + "\n"


def _annotation(command: str, report: Report, found: Sequence[Finding]) -> str:
    first = found[0]
    place = place_of(first, report)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    name = f"{place.name}: " if place.name else ""
    hint = f"\nhint: {show(first.hint)}" if first.hint else ""
    fields = {"title": f"{first.code} {first.name}", "file": place.path, "line": str(place.line)}
    properties = ",".join(f"{key}={_property(value)}" for key, value in fields.items())
    return f"::{command} {properties}::{_data(f'{name}{show(first.message)}{more}{hint}')}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
