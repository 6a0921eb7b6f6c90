"""What cannot be read is a finding of its path, and who asked for JSON gets JSON, whatever happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loraformat import schema
from loraformat.cli import main
from loraformat.cli.commands.validate import FORMS

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
GOOD = FIXTURES / "good" / "peft" / "tiny-llama"
OTHER = FIXTURES / "good" / "peft" / "rslora"
FAULTY = FIXTURES / "bad" / "LF202-rank-mismatch" / "adapter"
MINIGPT = FIXTURES / "minigpt"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def parsed(text: str) -> Any:
    """One JSON document and nothing else, as its schema says."""
    document = json.loads(text)
    name = "reports" if "reports" in document else "report"
    assert list(schema.check(name, document)) == []
    return document


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_a_missing_path_is_a_finding_and_the_others_are_judged(verb: str, tmp_path: Path) -> None:
    told = run(verb, GOOD, tmp_path / "missing", OTHER, "--format", "json")
    assert told.exit_code == 3
    reports = parsed(told.stdout)["reports"]
    assert [report["subject"] for report in reports] == [str(GOOD), str(tmp_path / "missing"), str(OTHER)]
    assert [report["ok"] for report in reports] == [True, False, True]
    (finding,) = reports[1]["findings"]
    assert (finding["code"], finding["message"]) == ("LF020", "no such file or folder")
    assert all(report["summary"] for report in (reports[0], reports[2]))


@pytest.mark.parametrize("fail_on", ["error", "never"])
@pytest.mark.parametrize("form", FORMS)
def test_reports_are_written_where_a_path_is_missing(form: str, fail_on: str, tmp_path: Path) -> None:
    file = tmp_path / "report"
    told = run("validate", FAULTY, tmp_path / "missing", "--fail-on", fail_on, "--report", f"{form}={file}")
    assert told.exit_code == 3
    assert "LF020" in file.read_text(encoding="utf-8")
    assert "LF202" in file.read_text(encoding="utf-8")


def test_a_missing_base_is_a_finding_in_every_report(tmp_path: Path) -> None:
    file = tmp_path / "report"
    assert run("validate", GOOD, "--base", tmp_path / "missing", "--report", f"json={file}").exit_code == 3
    (finding,) = parsed(file.read_text(encoding="utf-8"))["findings"]
    assert (finding["code"], finding["where"]) == ("LF020", str(tmp_path / "missing"))


def test_a_report_that_cannot_be_written_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.json"
    told = run("validate", GOOD, "--report", f"json={tmp_path / 'no' / 'x'}", "--report", f"json={wanted}")
    assert told.exit_code == 3
    assert "LF020" in told.stderr
    assert parsed(wanted.read_text(encoding="utf-8"))["ok"]
    both = run("validate", GOOD, "--report", f"json={tmp_path / 'no' / 'x'}", "--format", "json")
    assert (both.exit_code, parsed(both.stdout)["ok"]) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "job", "code", "exit_code"),
    [
        (["inspect", "missing"], "inspect", "LF020", 3),
        (["validate", "missing"], "validate", "LF020", 3),
        (["convert", "missing", "--to", "peft", "-o", "out"], "convert", "LF020", 3),
        (["merge", "missing", "adapter", "-o", "out"], "merge", "LF020", 3),
        (["merge", MINIGPT / "base", MINIGPT / "lora_adapter", "-o", "out"], "merge", "LF800", 1),
        (["verify", "missing"], "verify", "LF020", 3),
        (["diff", "missing", "other"], "diff", "LF020", 3),
        (["plot", "missing", "-o", "x.html"], "plot", "LF020", 3),
        (["estimate", "missing", "--rank", "8", "--targets", "q"], "estimate", "LF020", 3),
        (["inspect", "--bogus"], "inspect", "LF021", 2),
        (["merge", "--jobs", "0"], "merge", "LF021", 2),
        (["formats", "too", "many"], "formats", "LF021", 2),
        (["bogus"], "", "LF021", 2),
        (["--bogus"], "", "LF021", 2),
    ],
)
@pytest.mark.parametrize("option", [["--format", "json"], ["--format=json"]])
def test_a_refusal_is_json_where_json_was_asked_for(
    arguments: list[object],
    job: str,
    code: str,
    exit_code: int,
    option: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run(*arguments, *option)
    assert told.exit_code == exit_code, told.output
    document = parsed(told.stdout)
    assert (document["job"], document["ok"]) == (job, False)
    assert document["findings"][0]["code"] == code
    assert list(tmp_path.iterdir()) == []


def test_a_refused_merge_lists_what_it_is_refused_for() -> None:
    document = parsed(run("merge", MINIGPT / "base", MINIGPT / "lora_adapter", "-o", "x", "--format", "json").stdout)
    assert [finding["code"] for finding in document["findings"]] == ["LF800", "LF206"]
    assert document["subject"] == str(MINIGPT / "base")


def test_a_path_named_like_the_option_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "--", "--format=json").stdout == ""


def test_a_refusal_names_the_folder_of_a_damaged_file(tmp_path: Path) -> None:
    """Of several adapters every one has an `adapter_model.safetensors`."""
    root = Path(__file__).parent.parent.parent / "fixtures"
    good, base = root / "good" / "peft" / "tiny-llama", root / "minigpt" / "base"
    damaged = root / "bad" / "LF006-git-lfs-pointer" / "adapter"
    told = CliRunner().invoke(main, ["merge", str(base), str(damaged), str(good), "-o", str(tmp_path / "out")])
    assert f"error[LF006] {damaged}/adapter_model.safetensors: " in told.stderr
    told = CliRunner().invoke(main, ["inspect", str(damaged)])
    assert f"error[LF006] {damaged}/" in told.stderr
