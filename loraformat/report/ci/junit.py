"""JUnit XML: a suite for each adapter, a case for each rule, passed ones included.

Source: pytest 9.2, junit-10.xsd, the form that Jenkins publishes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from loraformat.diagnostics import Finding, Severity, show
from loraformat.model.results.validation import ValidateResult
from loraformat.report.base import Report


def render(reports: Sequence[Report], fail_on: Severity | None) -> str:
    """The suites; a case fails where something at or above `fail_on` was found (None: never)."""
    suites = [_suite(report, fail_on) for report in reports]
    root = Element("testsuites", _sums(suites))
    root.extend(suites)
    indent(root)
    return tostring(root, encoding="unicode", xml_declaration=False).join(
        ('<?xml version="1.0" encoding="utf-8"?>\n', "\n")
    )


def _sums(suites: Sequence[Element]) -> dict[str, str]:
    names = ("tests", "failures", "errors")
    return {"name": "loraformat", **{name: str(sum(int(suite.attrib[name]) for suite in suites)) for name in names}}


def _suite(report: Report, fail_on: Severity | None) -> Element:
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.code, []).append(finding)
    checked = report.data.checked if isinstance(report.data, ValidateResult) else ()
    skipped = {each.code: each.reason for each in report.skipped}
    codes = sorted({*checked, *skipped, *found})
    suite = Element("testsuite", {"name": show(report.subject)})
    failures = 0
    for code in codes:
        case = SubElement(
            suite, "testcase", {"classname": f"loraformat.{code[:3]}", "name": _name(code, found), "time": "0"}
        )
        failures += _fill(case, found.get(code, ()), fail_on)
        if code in skipped:
            SubElement(case, "skipped", {"message": show(skipped[code])})
    counts = {"tests": len(codes), "failures": failures, "errors": 0, "skipped": len(skipped)}
    suite.attrib.update({key: str(value) for key, value in counts.items()}, time="0")
    return suite


def _name(code: str, found: Mapping[str, Sequence[Finding]]) -> str:
    return f"{code} {found[code][0].name}" if code in found else code


def _fill(case: Element, findings: Sequence[Finding], fail_on: Severity | None) -> int:
    """1 where the case fails."""
    lines = [_line(finding) for finding in findings]
    if not findings:
        return 0
    if fail_on is None or all(finding.severity < fail_on for finding in findings):
        SubElement(case, "system-out").text = "\n".join(lines)
        return 0
    SubElement(case, "failure", {"message": lines[0], "type": findings[0].severity.value}).text = "\n".join(lines)
    return 1


def _line(finding: Finding) -> str:
    where = f"{show(finding.where)}: " if finding.where else ""
    hint = f" ({show(finding.hint)})" if finding.hint else ""
    return f"{finding.severity.value}: {where}{show(finding.message)}{hint}"
