"""`loraformat validate` as scripts use it: forms, files, settings, several adapters, and one verdict for all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loraformat.cli import main
from loraformat.cli.commands.validate import FORMS
from loraformat.report import FORMS as REPORT_FORMS

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
GOOD = FIXTURES / "good" / "peft" / "tiny-llama"
WARNED = FIXTURES / "bad" / "LF105-missing-base-model" / "adapter"
FAULTY = FIXTURES / "bad" / "LF202-rank-mismatch" / "adapter"
DAMAGED = FIXTURES / "bad" / "LF006-git-lfs-pointer" / "adapter"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def test_the_forms_of_the_command_are_those_of_the_reports() -> None:
    assert FORMS == REPORT_FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("adapters", "fail_on", "expected"),
    [
        ([GOOD], "error", 0),
        ([WARNED], "error", 0),
        ([WARNED], "warning", 1),
        ([FAULTY], "error", 1),
        ([FAULTY], "never", 0),
        ([GOOD, FAULTY], "error", 1),
        ([DAMAGED], "error", 1),
        ([GOOD, GOOD.parent / "nothing"], "error", 3),
    ],
)
def test_every_form_has_the_same_verdict(form: str, adapters: list[Path], fail_on: str, expected: int) -> None:
    assert run(*adapters, "--fail-on", fail_on, "--format", form).exit_code == expected


@pytest.mark.parametrize("form", ["json", "sarif", "gitlab", "jsonl"])
def test_json_parses_at_40_columns_through_a_pipe(form: str) -> None:
    command = [sys.executable, "-m", "loraformat", "validate", str(FAULTY), str(DAMAGED), "--format", form]
    environment = {**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stdout.isascii()
    for text in done.stdout.splitlines() if form == "jsonl" else [done.stdout]:
        json.loads(text)


def test_several_reports_of_one_run(tmp_path: Path) -> None:
    forms = [form for form in FORMS if form != "text"]
    arguments = [part for form in forms for part in ("--report", f"{form}={tmp_path / form}")]
    result = run(FAULTY, *arguments)
    assert result.exit_code == 1
    assert "error[LF202]" in result.stdout
    for form in forms:
        shown = run(FAULTY, "--format", form)
        assert (tmp_path / form).read_text(encoding="utf-8") == shown.stdout


def test_a_report_that_cannot_be_written_is_exit_3_and_leaves_nothing(tmp_path: Path) -> None:
    assert run(GOOD, "--report", f"json={tmp_path / 'nothing' / 'x.json'}").exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["json", "xml=a", "json=", "=a"])
def test_a_report_that_is_none_is_a_usage_error(value: str) -> None:
    assert run(GOOD, "--report", value).exit_code == 2


def test_settings_of_the_project_hold_unless_it_is_isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / "loraformat.toml").write_text('[validate]\nfail-on = "warning"\n')
    told = run(WARNED)
    assert told.exit_code == 1
    assert told.stderr == f"settings: {tmp_path / 'loraformat.toml'}\n"
    assert run(WARNED, "--fail-on", "error").exit_code == 0
    assert run(WARNED, "--isolated").exit_code == 0
    (tmp_path / "other.toml").write_text('[validate]\nignore = ["LF1"]\nfail-on = "warning"\n')
    assert run(WARNED, "--config", "other.toml").exit_code == 0


def test_settings_that_are_passed_over_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loraformat.toml in a folder that is no root of a project, from a folder below it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "loraformat.toml").write_text('[validate]\nfail-on = "warning"\n')
    monkeypatch.chdir(tmp_path / "sub")
    told = run(WARNED)
    assert told.exit_code == 0
    assert f"{tmp_path / 'loraformat.toml'}: ignored" in told.stderr
    assert run(WARNED, "--isolated").stderr == ""
    (tmp_path / "pyproject.toml").touch()
    assert run(WARNED).exit_code == 1


def test_settings_inside_an_adapter_say_nothing_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FAULTY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".git").mkdir()
    (tmp_path / "loraformat.toml").write_text('[validate]\nfail-on = "never"\n')
    assert run(tmp_path).exit_code == 1
    monkeypatch.chdir(tmp_path)
    for name in (".", "adapter_config.json", "adapter_model.safetensors"):
        told = run(name)
        assert told.exit_code == 1
        assert f"{tmp_path / 'loraformat.toml'}: ignored" in told.stderr
    assert run(".", "--config", "loraformat.toml").exit_code == 0


@pytest.mark.parametrize("code", ["LF9999", "LF1005", "X1", "", "L", "lf10x"])
@pytest.mark.parametrize("option", ["--select", "--ignore"])
def test_an_unknown_code_is_a_usage_error(option: str, code: str) -> None:
    told = run(GOOD, option, code)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert f'error[LF021] {option}: expected a code or its beginning, found "{code}"' in told.stderr


def test_an_unknown_code_is_told_with_the_nearest() -> None:
    assert "(did you mean LF105 (missing-base-model)?)" in run(GOOD, "--ignore", "missing_base_model").stderr
    assert "(did you mean LF105 (missing-base-model)?)" in run(GOOD, "--ignore", "LF1055").stderr


def test_codes_are_taken_in_any_case() -> None:
    assert run(WARNED, "--fail-on", "warning").exit_code == 1
    assert run(WARNED, "--fail-on", "warning", "--ignore", "lf105").exit_code == 0
    assert run(FAULTY, "--select", "lf2").exit_code == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--select", "LF301"], "no base was given"),
        (["--select", "LF4"], "values are read only with --deep"),
        (["--select", "LF6"], "no target was given"),
        (["--ignore", "LF"], "none are selected"),
        (["--select", "LF9"], "none are selected"),
        (["--select", "LF2", "--ignore", "LF2"], "none are selected"),
    ],
)
def test_a_run_without_a_rule_is_never_ok(form: str, options: list[str], reason: str) -> None:
    told = run(GOOD, *options, "--format", form, "--fail-on", "never")
    assert told.exit_code == 2
    assert "OK" not in told.stdout
    assert "LF022" in told.stdout
    assert form == "github" or reason.split(":", maxsplit=1)[0] in told.stdout


def test_an_adapter_that_cannot_be_read_has_its_own_error_where_no_rule_ran() -> None:
    told = run(DAMAGED, "--select", "LF2", "--format", "json")
    assert told.exit_code == 1
    assert [finding["code"] for finding in json.loads(told.stdout)["findings"]] == ["LF006"]


def test_broken_settings_are_exit_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / "loraformat.toml").write_text("[validate\n")
    result = run(GOOD)
    assert result.exit_code == 3
    assert "loraformat.toml" in result.stderr


def test_a_file_of_a_folder_stands_for_it() -> None:
    shown = run(FAULTY / "adapter_config.json", FAULTY / "adapter_model.safetensors", "--format", "concise")
    assert shown.stdout.splitlines()[-1] == "1 adapter: 1 error"


def test_a_target_that_is_none_is_named() -> None:
    result = run(GOOD, "--target", "vlm")
    assert result.exit_code == 2
    assert "vllm" in result.stderr


def test_explain_knows_the_runtimes() -> None:
    listed = CliRunner().invoke(main, ["explain", "targets"]).stdout
    assert "vllm" in listed
    page = CliRunner().invoke(main, ["explain", "vllm"]).stdout
    assert "LF603" in page
    assert "vLLM does not yet support DoRA." in page


def test_a_pickle_that_is_no_part_of_the_adapter_is_never_opened(tmp_path: Path) -> None:
    for path in WARNED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 100)
    (tmp_path / "optimizer.pt").chmod(0)
    opened: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("optimizer.pt"):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    assert run(tmp_path).exit_code == 0
    assert opened == []


def test_codes_are_taken_with_commas_too(tmp_path: Path) -> None:
    apart = run(GOOD, "--isolated", "--select", "LF2", "--select", "LF105", "--format", "json")
    together = run(GOOD, "--isolated", "--select", "LF2,LF105", "--format", "json")
    assert together.stdout == apart.stdout
    assert "LF202" in together.stdout
    assert together.exit_code == 0
    refused = run(GOOD, "--isolated", "--ignore", "LF105,LF9999")
    assert refused.exit_code == 2
    assert 'found "LF9999"' in refused.stderr


def test_text_about_several_adapters_names_each_before_its_findings(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(GOOD, tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 7}))
    lines = run(tmp_path, "--isolated").stdout.splitlines()
    one, two = lines.index(str(tmp_path / "one")), lines.index(str(tmp_path / "two"))
    assert "LF204" in lines[one + 1]
    assert "LF204" in lines[two + 1]
    assert lines[-1].startswith("2 adapters: ")
    assert sum(line.startswith("not checked: ") for line in lines[:two]) == 0
    assert any(line.startswith("not checked: ") for line in lines[two:])
