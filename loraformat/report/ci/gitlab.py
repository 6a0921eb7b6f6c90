"""Code Quality of GitLab: a JSON list with a stable fingerprint for each finding.

Source: docs.gitlab.com, ci/testing/code_quality, "Code Quality report format".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from loraformat.diagnostics import Finding, Severity, json_text, show
from loraformat.report.base import Report
from loraformat.report.ci.places import place_of

_SEVERITIES = {Severity.ERROR: "major", Severity.WARNING: "minor", Severity.INFO: "info"}


def render(reports: Sequence[Report]) -> str:
    """Every finding as an issue."""
    issues = [_issue(finding, report) for report in reports for finding in report.findings]
    return json_text(issues, indent=2) + "\n"


def _issue(finding: Finding, report: Report) -> dict[str, object]:
    place = place_of(finding, report)
    name = f"{place.name}: " if place.name else ""
    return {
        "description": f"{finding.code} {name}{show(finding.message)}",
        "check_name": f"{finding.code}-{finding.name}",
        "fingerprint": fingerprint(finding, report),
        "severity": _SEVERITIES[finding.severity],
        "location": {"path": place.path, "lines": {"begin": place.line}},
    }


def fingerprint(finding: Finding, report: Report) -> str:
    """The same for the same fault at the same place, whatever else changes."""
    place = place_of(finding, report)
    said = "\0".join((finding.code, place.path, place.name, finding.message))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
