"""Reports of every job, in every format, from hand-made data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from loraformat.diagnostics import Finding, FindingLocation, Severity, in_weights
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.results.validation import Skipped, ValidateResult
from loraformat.model.results.verbs import (
    Checked,
    ConvertResult,
    InspectResult,
    MergedAdapter,
    MergeResult,
    Result,
)
from loraformat.model.results.weight_figures import weight_records
from loraformat.model.summary import summarize
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank
from loraformat.report import RENDERERS, Report, render, render_all
from loraformat.report.lines import columns_of, shorten
from loraformat.report.terminal.text import progress, render_findings
from loraformat.report.words import counts

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas" / "report.schema.json").read_text())
NASTY = "evil/[bold]\x1b]0;title\x07[/nope]\nforged: line"


def tensor(*shape: int) -> LazyTensor:
    return LazyTensor(shape, DType.F32, lambda start, stop: None)  # type: ignore[arg-type, return-value]


def adapter(layers: int = 2) -> Adapter:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(layers) for kind in "qv"]
    updates = {name: (LowRank(tensor(64, 4), tensor(4, 64), None if "q_" in name else 0.25),) for name in names}
    return Adapter(config=AdapterConfig(base_model=NASTY, targets=("q_proj", "v_proj")), updates=updates)


def finding(severity: Severity = Severity.ERROR) -> Finding:
    return Finding(
        code="LF202",
        name="rank-mismatch",
        severity=severity,
        location=FindingLocation(subject="a.json"),
        message=NASTY,
        hint="try b",
    )


MERGED = MergeResult(
    base="base/",
    adapters=(MergedAdapter(uri="adapter/", format="native", applied=8, modules=8),),
    tensors_touched=9,
    tensors_copied=30,
    parameters_touched=40_000,
    bytes_written=450_000,
    files=("config.json", "model.pt"),
)
RESULTS: dict[str, Result | None] = {
    "inspect": InspectResult(weights=weight_records(adapter()), layer_norms={0: 1.0, 1: math.nan}, total_norm=math.inf),
    "validate": ValidateResult(checked=("LF103", "LF202")),
    "convert": ConvertResult(source="native", target="peft", weights=4, bytes_written=4096, files=("a", "b")),
    "merge": MERGED,
}


def report(job: str, **more: object) -> Report:
    fields = {
        "job": job,
        "subject": NASTY,
        "format": "native",
        "reason": "lora_config.json",
        "summary": summarize(adapter()),
        "data": RESULTS[job],
        "skipped": (Skipped("LF301", "absent-module", "no base was given"),),
        "written": ("out/",) if job in ("convert", "merge") else (),
        **more,
    }
    return Report(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("job", RESULTS)
def test_json_is_what_the_schema_says(job: str) -> None:
    for one in (report(job), report(job, findings=(finding(),), data=None, summary=None)):
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(render(one, "json")))


def test_the_schema_and_its_examples_are_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for example in SCHEMA["examples"]:
        jsonschema.Draft202012Validator(SCHEMA).validate(example)


def test_a_merge_into_what_was_trained_on_says_how_large_the_quantization_error_is() -> None:
    merged = replace(MERGED, as_trained="nf4", tensors_dequantized=4, base_change=0.8123)
    lines = render(report("merge", data=merged), "text").splitlines()
    trained = "nf4: linear layers quantized and dequantized; the quantization error is 0.812 of the update"
    assert any(line.endswith(trained) for line in lines)
    assert any(line.endswith("30 copied, 4 only quantized and dequantized") for line in lines)
    plain = render(report("merge", data=replace(merged, as_trained="")), "text")
    assert "4 quantized weights dequantized\n" in plain


def test_a_plan_is_part_of_the_json() -> None:
    dry = replace(MERGED, is_dry_run=True, plan={"version": 1, "shards": [{"name": "x", "sizes": [1, 2]}]})
    document = json.loads(render(report("merge", data=dry), "json"))
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["data"]["plan"]["shards"] == [{"name": "x", "sizes": [1, 2]}]


@pytest.mark.parametrize("job", RESULTS)
def test_json_is_ascii_sorted_and_ends_with_a_newline(job: str) -> None:
    text = render(report(job), "json", width=20)
    assert text.isascii()
    assert text.endswith("}\n")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_what_is_not_finite_is_null_and_an_unknown_scale_is_named() -> None:
    document = json.loads(render(report("inspect"), "json"))
    assert document["data"]["layer_norms"] == {"0": 1.0, "1": None}
    assert document["data"]["total_norm"] is None
    assert document["summary"]["scales"] == {"0.25": 2, "unknown": 2}


@pytest.mark.parametrize("job", RESULTS)
@pytest.mark.parametrize("renderer", RENDERERS)
def test_nothing_from_a_file_reaches_the_terminal_as_it_was(job: str, renderer: str) -> None:
    text = render(report(job, findings=(finding(),)), renderer)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert not any(line.startswith("forged") for line in text.splitlines())


@pytest.mark.parametrize("job", RESULTS)
def test_color_changes_nothing_but_the_colors(job: str) -> None:
    one = report(job, findings=(finding(Severity.WARNING),))
    colored = render(one, width=100, color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(one, width=100)


@pytest.mark.parametrize("job", RESULTS)
def test_the_word_warning_stands_only_where_there_is_one(job: str) -> None:
    assert "warning" not in render(report(job)).lower()
    assert "warning[LF202]" in render(report(job, findings=(finding(Severity.WARNING),)))


def test_a_finding_names_place_code_and_remedy() -> None:
    assert render_findings([finding()]).splitlines()[0].startswith("a.json: error[LF202] evil/[bold]\\x1b]0;title")
    assert render_findings([finding()]).splitlines()[1] == "  hint: try b"
    assert render_findings([]) == ""


def test_a_pipe_gets_whole_names_and_a_terminal_gets_what_fits() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name in render(report("inspect"))
    narrow = render(report("inspect"), width=72).splitlines()
    assert name not in "\n".join(narrow)
    assert all(columns_of(line) <= 72 for line in narrow if "low-rank " in line and "updates" not in line)


def test_many_weights_are_grouped() -> None:
    data = InspectResult(weights=weight_records(adapter(layers=64)), layer_norms={})
    text = render(report("inspect", data=data))
    assert len(text.splitlines()) < 20
    assert len(json.loads(render(report("inspect", data=data), "json"))["data"]["weights"]) == 128


def test_names_are_cut_in_the_middle() -> None:
    assert shorten("model.layers.0.self_attn.q_proj", 20) == "model.la...tn.q_proj"
    for width in range(5, 40):
        assert columns_of(shorten("模型.layers.0.self_attn.查询_proj", width)) <= width
    assert shorten("short", 10) == "short"


def test_merge_says_how_many_modules_were_applied() -> None:
    text = render(report("merge"))
    assert "8 of 8 modules" in text
    assert "nothing written" in render(report("merge", data=replace(MERGED, is_dry_run=True)))


def test_counts_are_in_words() -> None:
    found = [finding(), finding(), finding(Severity.WARNING), finding(Severity.INFO)]
    assert counts(found) == "2 errors, 1 warning, 1 note"


def test_a_report_knows_its_verdict_and_its_records() -> None:
    assert report("validate").ok
    assert report("validate", findings=(finding(Severity.WARNING),)).worst is Severity.WARNING
    assert not report("validate", findings=(finding(),)).ok
    assert [record["weight"] for record in report("inspect").records()] == sorted(adapter().updates)
    assert report("merge").records() == []


def test_a_notebook_gets_escaped_html() -> None:
    html = report("inspect", findings=(finding(),), subject="<script>")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html


def test_a_notebook_gets_a_heat_map_where_there_are_norms() -> None:
    records = tuple(replace(record, norm=float(at + 1)) for at, record in enumerate(weight_records(adapter())))
    shown = report("inspect", data=InspectResult(weights=records, layer_norms={}))._repr_html_()
    assert shown.count('class="c ') == 4
    assert "<script" not in shown
    assert "<svg" not in report("inspect")._repr_html_()


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("merging") as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_json_needs_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from loraformat.report import Report, render; render(Report(job='validate', subject='x'), 'json');"
        "print([name for name in ('torch', 'rich', 'numpy', 'jsonschema') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_merge_says_what_was_checked_and_what_could_not_be() -> None:
    found = Checked(changed=9, followed=9, compared=7, copied=1, copies_compared=1, unscaled=0)
    text = render(report("merge", data=replace(MERGED, checked=found)), "text")
    assert "checked 7 of 9 changed tensors against an independent computation, 1 of 1 copy against the base\n" in text
    less = replace(found, followed=7, unscaled=2)
    text = render(report("merge", data=replace(MERGED, checked=less)), "text")
    assert "where the updates belong; 2 scales taken as read: the format defines no formula" in text


def flood(count: int) -> tuple[Finding, ...]:
    worst = replace(finding(), location=in_weights("m.zz"))
    return (
        *(replace(finding(Severity.WARNING), location=in_weights(f"m.{number:06}")) for number in range(count)),
        worst,
    )


def test_of_a_flood_the_worst_is_shown_and_the_rest_is_counted() -> None:
    text = render(report("validate", findings=flood(50_000)))
    assert text.count("warning[LF202]") == 999
    assert "m.zz: error[LF202]" in text
    assert "not shown: 49,001 warnings more (--format json lists all of them)" in text
    assert "1 error, 50,000 warnings" in text


@pytest.mark.parametrize("form", ["json", "jsonl", "sarif", "junit", "gitlab", "concise"])
def test_reports_for_machines_hold_all_of_a_flood(form: str) -> None:
    assert render_all([report("validate", findings=flood(2000))], form).count("m.001999") >= 1
