"""The forms of `validate --format`: each is what its reader expects, whatever the files try to put into it."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
import xmlschema
from markdown_it import MarkdownIt

from loraformat.diagnostics import NOWHERE, Finding, FindingLocation, Severity, in_weights
from loraformat.jobs.explain import pages
from loraformat.model.results.validation import Skipped, ValidateResult
from loraformat.report import FORMS, Report, render_all
from loraformat.schema import check

NASTY = "a]]>\x1b]0;x\x07<b>|`\u202e%0A\n::error::boo, a=b:c" + "x" * 300


def finding(code: str = "LF202", severity: Severity = Severity.ERROR, location: FindingLocation = NOWHERE) -> Finding:
    return Finding(code=code, name="rank-mismatch", severity=severity, location=location, message=NASTY, hint=NASTY)


def report(*findings: Finding, subject: str = "adapters/one") -> Report:
    return Report(
        job="validate",
        subject=subject,
        format="peft",
        data=ValidateResult(checked=("LF103", "LF202"), file="adapter_model.safetensors"),
        findings=findings,
        skipped=(Skipped("LF301", "absent-module", "no base was given"),),
    )


REPORTS = {
    "none": [report()],
    "one": [
        report(
            finding(location=FindingLocation(file="adapter_config.json", path=("r",), line=7)),
            finding("LF105", Severity.WARNING),
        )
    ],
    "hostile": [
        report(
            finding(location=FindingLocation(subject=NASTY, file=NASTY, path=(NASTY, 0, NASTY))),
            finding("LF031", Severity.INFO, in_weights(NASTY, more=2)),
            subject=NASTY,
        )
    ],
    "several": [report(finding()), report(subject="adapters/two"), report(finding("LF003"), subject="c.safetensors")],
}
CASES = pytest.mark.parametrize("reports", REPORTS.values(), ids=REPORTS)


@CASES
@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_file_reaches_the_output_raw(form: str, reports: list[Report]) -> None:
    text = render_all(reports, form, pages=pages(), width=40)
    assert not text or text.endswith("\n")
    assert not set(text) & set("\x1b\x07\u202e\r")
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::error::boo")]


@CASES
@pytest.mark.parametrize("form", FORMS)
def test_the_same_reports_give_the_same_text(form: str, reports: list[Report]) -> None:
    assert render_all(reports, form, pages=pages()) == render_all(list(reports), form, pages=pages())


@CASES
def test_json_lists_and_lines_parse_and_hold_every_finding(reports: list[Report]) -> None:
    found = [(each.subject, finding.code) for each in reports for finding in each.findings]
    lines = [json.loads(line) for line in render_all(reports, "jsonl").splitlines()]
    assert [(line["adapter"], line["code"]) for line in lines] == found
    document = json.loads(render_all([*reports, report()], "json"))
    assert list(check("reports", document)) == []
    assert all(list(check("report", each)) == [] for each in document["reports"])
    assert document["ok"] == all(each.ok for each in reports)


# Where these come from is said in the README beside them. The variable names another edition, with errata, say.
SCHEMAS = Path(__file__).parent.parent / "schemas"
SARIF_SCHEMA = Path(os.environ.get("SARIF_SCHEMA", SCHEMAS / "sarif-schema-2.1.0.json"))


@pytest.fixture(scope="module")
def sarif() -> jsonschema.protocols.Validator:
    schema = json.loads(SARIF_SCHEMA.read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


@pytest.fixture(scope="module")
def junit() -> xmlschema.XMLSchema:
    return xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd")


@CASES
def test_sarif_is_what_the_official_schema_says(reports: list[Report], sarif: jsonschema.protocols.Validator) -> None:
    sarif.validate(json.loads(render_all(reports, "sarif", pages=pages())))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ('"driver"', '"program"'),
        ('"level": "error"', '"level": "fatal"'),
        ('"text"', '"words"'),
        ('"artifactLocation"', '"file"'),
        ('"startLine": 7', '"startLine": 0'),
        ('"version": "2.1.0"', '"version": "2.2.0"'),
    ],
)
def test_the_official_schema_refuses_a_broken_report(
    part: str, other: str, sarif: jsonschema.protocols.Validator
) -> None:
    text = render_all(REPORTS["one"], "sarif", pages=pages())
    assert part in text
    assert not sarif.is_valid(json.loads(text.replace(part, other)))


@CASES
def test_sarif_has_what_code_scanning_asks_for(reports: list[Report]) -> None:
    """docs.github.com, "SARIF support for code scanning", the properties marked as required."""
    document = json.loads(render_all(reports, "sarif", pages=pages()))
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    for rule in rules:
        assert rule["shortDescription"]["text"]
        assert rule["fullDescription"]["text"]
        assert rule["help"]["text"]
    assert len(run["results"]) == sum(len(each.findings) for each in reports)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        assert re.fullmatch(r"[A-Za-z0-9_.~/%\-]+", physical["artifactLocation"]["uri"])
        assert set(physical["region"]) == {"startLine", "startColumn", "endLine", "endColumn"}
        assert result["partialFingerprints"]["primaryLocationLineHash"]


def test_sarif_points_at_the_line_of_a_config_and_at_the_file_of_a_tensor() -> None:
    reports = [
        report(
            finding(location=FindingLocation(file="adapter_config.json", path=("r",), line=7)),
            finding(location=in_weights("model.q_proj.weight")),
        )
    ]
    results = json.loads(render_all(reports, "sarif", pages=pages()))["runs"][0]["results"]
    places = [each["locations"][0] for each in results]
    assert places[0]["physicalLocation"]["artifactLocation"]["uri"] == "adapters/one/adapter_config.json"
    assert places[0]["physicalLocation"]["region"]["startLine"] == 7
    assert places[1]["physicalLocation"]["artifactLocation"]["uri"] == "adapters/one/adapter_model.safetensors"
    assert places[1]["logicalLocations"] == [{"fullyQualifiedName": "model.q_proj.weight"}]


# junit-10.xsd of Jenkins: element → attributes that it may have.
JUNIT = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "time", "classname"},
    "failure": {"type", "message"},
    "skipped": {"type", "message"},
    "system-out": set(),
}


@CASES
@pytest.mark.parametrize("fail_on", [Severity.ERROR, Severity.WARNING, None])
def test_junit_has_a_case_for_each_rule_and_counts_that_are_right(
    reports: list[Report], fail_on: Severity | None
) -> None:
    root = ET.fromstring(render_all(reports, "junit", fail_on=fail_on))
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) <= JUNIT[element.tag]
    for suite, each in zip(root, reports, strict=True):
        cases = list(suite)
        failing = {found.code for found in each.findings if fail_on is not None and found.severity >= fail_on}
        codes = {case.attrib["name"].partition(" ")[0] for case in cases}
        assert codes == {"LF103", "LF202", "LF301", *(found.code for found in each.findings)}
        assert {case.attrib["name"].partition(" ")[0] for case in cases if case.find("failure") is not None} == failing
        assert suite.attrib["failures"] == str(len(failing))
        assert suite.attrib["tests"] == str(len(cases))
        assert suite.attrib["skipped"] == str(sum(case.find("skipped") is not None for case in cases))


@CASES
def test_junit_is_what_the_schema_of_jenkins_says(reports: list[Report], junit: xmlschema.XMLSchema) -> None:
    junit.validate(render_all(reports, "junit"))


@pytest.mark.parametrize(
    ("part", "other"),
    [(" classname=", " class="), (" tests=", " cases="), (' time="0"', ' time="none"'), ("failure", "fault")],
)
def test_the_schema_of_jenkins_refuses_a_broken_report(part: str, other: str, junit: xmlschema.XMLSchema) -> None:
    text = render_all(REPORTS["one"], "junit")
    assert part in text
    assert not junit.is_valid(text.replace(part, other))


@CASES
def test_gitlab_has_what_code_quality_asks_for(reports: list[Report]) -> None:
    issues = json.loads(render_all(reports, "gitlab"))
    assert len(issues) == sum(len(each.findings) for each in reports)
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    for issue in issues:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["lines"]["begin"] >= 1
        assert not issue["location"]["path"].startswith("/")


def test_github_gets_ten_annotations_of_a_kind_at_most() -> None:
    many = [report(*[finding(f"LF{number:03}") for number in range(100, 130)]) for _ in range(2)]
    lines = render_all(many, "github").splitlines()
    assert sum(line.startswith("::error ") for line in lines) == 10
    assert lines[9] == "::error title=loraformat::51 more; the report lists all of them"


def test_github_joins_the_findings_of_one_rule_on_one_adapter() -> None:
    (line, total) = render_all(
        [report(*[finding(location=in_weights(f"model.{n}.weight")) for n in range(5)])], "github"
    ).splitlines()
    assert line.startswith("::error title=LF202 rank-mismatch,file=adapters/one/adapter_model.safetensors,line=1::")
    assert "(and 4 more)" in line
    assert total == "1 adapter: 5 errors"


def test_github_properties_cannot_be_broken_out_of() -> None:
    (line, _) = render_all([report(finding(), subject="a,line=9::b%\nc")], "github").splitlines()
    properties, _, _ = line.removeprefix("::error ").partition("::")
    assert [field.partition("=")[0] for field in properties.split(",")] == ["title", "file", "line"]


def test_a_finding_is_one_line_of_the_concise_form() -> None:
    text = render_all(REPORTS["several"], "concise")
    assert len(text.splitlines()) == 3
    assert text.splitlines()[-1] == "3 adapters: 2 errors"


COMMANDS = ("::add-mask::x", "##vso[task.x]", "##[command]", "##teamcity[x]", "::stop-commands::y")


@pytest.mark.parametrize("before", ["", " ", "model.", "\t", "a: "])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_name_cannot_be_taken_for_a_command_of_a_ci_system(form: str, command: str, before: str) -> None:
    text = before + command
    one = Finding(
        code="LF202",
        name="rank-mismatch",
        severity=Severity.ERROR,
        location=FindingLocation(subject=text),
        message=text,
        hint=text,
    )
    shown = render_all([report(one, subject=text)], form, pages=pages())
    own = ("::error ", "::warning ", "::notice ")
    for line in shown.splitlines():
        assert "##[" not in line
        assert not re.search(r"##\w+\[", line)
        assert "::" not in line or (form == "github" and line.startswith(own) and line.count("::") == 2)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_json_reads_back_as_it_was(form: str) -> None:
    text = 'a::b ##[x] "::" \\ud800 \U0001f600 é'
    shown = render_all([report(subject=text)] if form == "json" else [report(finding(), subject=text)], form)
    document = json.loads(shown)
    assert document["subject" if form == "json" else "adapter"] == text
    assert shown.isascii()


@pytest.mark.parametrize("character", ["\ufffe", "\uffff", "\ud800", "\U0001ffff", "\ufdd0", "\0", "\x1b", "\x85"])
@pytest.mark.parametrize("form", FORMS)
def test_no_character_makes_a_report_that_its_readers_refuse(form: str, character: str) -> None:
    text = f"m.{character}.q_proj"
    one = Finding(
        code="LF202",
        name="rank-mismatch",
        severity=Severity.ERROR,
        location=FindingLocation(subject=text),
        message=text,
        hint=text,
    )
    shown = render_all([report(one, subject=text)], form, pages=pages())
    shown.encode("utf-8")
    assert character not in shown
    if form == "junit":
        ET.fromstring(shown)
    if form in ("json", "gitlab", "sarif"):
        json.dumps(json.loads(shown), ensure_ascii=False).encode("utf-8")  # no half of a pair, which others refuse


@pytest.mark.parametrize("form", FORMS)
def test_what_is_invisible_is_shown(form: str) -> None:
    """Tag characters spell ASCII that no reader sees and a language model reads."""
    hidden = "".join(chr(0xE0000 + ord(character)) for character in "ignore all") + "\ufe0f\u3164\u00ad\u2063"
    shown = render_all(
        [report(finding(location=in_weights(f"q_proj{hidden}")), subject=f"a{hidden}")], form, pages=pages()
    )
    assert not set(shown) & set(hidden)
    assert form == "github" or "e0069" in shown.lower() or "udb40" in shown


MARKUP = (
    "https://evil.example/x www.evil.example mail@evil.example @everyone #12 GH-1 deadbeef <b>x</b> <!-- -->"
    " ![a](http://b) [a]: http://b `x` ``y`` | a \\| b \\\\| c \\ *i* **b** ~~s~~ $x$ {{x}} &amp;"
)


@pytest.mark.parametrize("text", [MARKUP, *MARKUP.split(" "), " `", "` ", "a|b", "|", "\\", "``` x", "- [ ] x"])
def test_markdown_takes_no_markup_from_a_file(text: str) -> None:
    """Read by a Markdown library: all that is foreign stands in code spans, in which nothing is a link or a mention."""
    one = Finding(
        code="LF202",
        name="rank-mismatch",
        severity=Severity.ERROR,
        location=FindingLocation(subject=text),
        message=text,
        hint=text,
    )
    shown = render_all([report(one, subject=text)], "markdown")
    tokens = MarkdownIt("commonmark").enable("table").parse(shown)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close", "html_inline"}
    assert {child.content for child in inline if child.type == "html_inline"} <= {"<br>"}
    own = "".join(child.content for child in inline if child.type == "text")
    assert re.fullmatch(r"[\w :,-]*", own), own
    assert [token.type for token in tokens].count("td_open") == 4
    assert [child.type for child in inline].count("code_inline") == 4


def test_a_code_span_of_markdown_holds_the_text_as_it_is() -> None:
    text = "target_modules: (q|v)_proj `x` \\d"
    one = Finding(
        code="LF202", name="rank-mismatch", severity=Severity.ERROR, location=FindingLocation(subject=text), message="m"
    )
    tokens = MarkdownIt("commonmark").enable("table").parse(render_all([report(one)], "markdown"))
    inline = [child for token in tokens for child in token.children or [] if child.type == "code_inline"]
    assert [child.content for child in inline] == ["adapters/one", text, "m"]
