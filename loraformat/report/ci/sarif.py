"""SARIF 2.1.0, for code scanning.

A tensor has no line: a finding about one stands at line 1 of its file, with the name as logical location.
Source: OASIS, sarif-v2.1.0; docs.github.com, "SARIF support for code scanning".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from loraformat._version import __version__
from loraformat.diagnostics import Finding, Severity, json_text, show
from loraformat.report.base import Report
from loraformat.report.ci.gitlab import fingerprint
from loraformat.report.ci.places import place_of

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
MOST_RESULTS = 25_000  # GitHub refuses more


class Described(Protocol):
    """What is known of a code: its name, and its page in Markdown."""

    @property
    def name(self) -> str:
        """`rank-mismatch`."""

    @property
    def severity(self) -> Severity:
        """Of its findings."""

    @property
    def text(self) -> str:
        """The page; its first line is a sentence."""


def render(reports: Sequence[Report], pages: Mapping[str, Described]) -> str:
    """One run with all adapters; the rules are those that found something."""
    found = [(finding, report) for report in reports for finding in report.findings][:MOST_RESULTS]
    codes = sorted({finding.code for finding, _ in found})
    driver = {
        "name": "loraformat",
        "version": __version__,
        "rules": [_rule(code, pages.get(code)) for code in codes],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding, report, codes.index(finding.code)) for finding, report in found],
    }
    document = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json_text(document, indent=2) + "\n"


def _rule(code: str, page: Described | None) -> dict[str, object]:
    text = page.text if page else code
    first = text.splitlines()[0]
    return {
        "id": code,
        "name": "".join(part.capitalize() for part in (page.name if page else code).split("-")),
        "shortDescription": {"text": first},
        "fullDescription": {"text": first},
        "help": {"text": text, "markdown": text},
        "defaultConfiguration": {"level": _LEVELS[page.severity] if page else "error"},
    }


def _result(finding: Finding, report: Report, index: int) -> dict[str, object]:
    place = place_of(finding, report)
    name = f"{place.name}: " if place.name else ""
    hint = f" ({show(finding.hint)})" if finding.hint else ""
    region = {"startLine": place.line, "startColumn": 1, "endLine": place.line, "endColumn": 2}
    location: dict[str, object] = {"physicalLocation": {"artifactLocation": {"uri": place.uri}, "region": region}}
    if place.name:
        location["logicalLocations"] = [{"fullyQualifiedName": place.name}]
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{name}{show(finding.message)}{hint}"},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": fingerprint(finding, report)[:32]},
    }
