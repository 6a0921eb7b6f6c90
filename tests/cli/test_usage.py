"""Mistakes on the command line: exit code 2, and what was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loraformat import __version__
from loraformat.cli import COMMANDS, main

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER = FIXTURES / "good" / "peft" / "tiny-llama"
BASE = FIXTURES / "minigpt" / "base"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", ADAPTER, "-o", "out", "--to", "pfet"], "did you mean peft?"),
        (["convert", ADAPTER, "-o", "out", "--to", "torchtune"], "writable formats: native, peft"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--from", "pfet"], "did you mean peft?"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--dtype", "flaot32"], "Did you mean float32?"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--assume", "alhpa=3"], "Did you mean alpha?"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--peft-version", "x"], "such as 0.10"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--pefd-version", "1"], "--peft-version"),
        (
            ["convert", ADAPTER, "-o", "out", "--to", "native", "--peft-version", "0.10"],
            "--peft-version needs --to peft",
        ),
        (["inspect", ADAPTER, "--from", "pfet"], "did you mean peft?"),
        (["inspect", ADAPTER, "--sort", "nrom"], "Did you mean norm?"),
        (["validate", ADAPTER, "--from", "pfet"], "did you mean peft?"),
        (["validate", ADAPTER, "--format", "jsno"], "Did you mean json?"),
        (["validate", ADAPTER, "--report", "jsno=x"], "Did you mean json?"),
        (["validate", ADAPTER, "--target", "vlm"], "Did you mean vllm?"),
        (["merge", BASE, ADAPTER, "-o", "out", "--verify", "ful"], "Did you mean full?"),
        (["merge", BASE, f"{ADAPTER}=0,7", "-o", "out"], "not a finite number: '0,7' (write ADAPTER=0.7)"),
        (["merge", BASE, ADAPTER, "-o", "out", "--alpha", "5"], "leave --alpha out"),
        (["convert", ADAPTER, "-o", "out", "--to", "peft", "--assume", "rank=3"], "leave --assume out"),
        (["inspect", ADAPTER, "--alpha", "5"], "leave --alpha out"),
        (["merge", BASE, ADAPTER, "-o", "out", "--device", "tpu"], "'tpu' is not a device"),
        (["merge", BASE, ADAPTER, "-o", "out", "--max-shard-size", "0"], "at least 1 byte"),
        (["merge", BASE, ADAPTER, "-o", "out", "--memory", "0.4"], "at least 1 byte"),
        (["estimate", BASE, "--rank", "8", "--targets", "q_porj"], "matches no weight"),
        (["plot", ADAPTER, "-o", "page.txt"], ".html"),
        (["explain", "vlm"], "Did you mean vllm?"),
        (["inpsect", ADAPTER], "Did you mean inspect?"),
        (["help", "mrege"], "Did you mean merge?"),
        (
            ["convert", ADAPTER, "-o", "out", "--to", "ggml"],
            "did you mean gguf? writable formats: native, peft, mlx, gguf, loralib, litgpt, diffusers, kohya, comfy",
        ),
        (["resize", ADAPTER, "-o", "out"], "no rank is given (pass for example --rank 8 or --error 0.1)"),
        (["extract", BASE, BASE, "-o", "out"], "no rank is given (pass for example --rank 32)"),
        (["frobnicate"], "'frobnicate' is not a command.\n"),
        (["explain", "LF999"], "LF999 is not a code. `loraformat explain` lists them."),
        (["explain", "nonsense"], "nonsense is not a code. `loraformat explain` lists them."),
        (["merge", BASE, ADAPTER, "--alpha", "-o", "out"], "the option before it needs a value"),
        (["validate", ADAPTER, "--base"], "validate --help' for help."),
        (["hf://owner/name"], "Did you mean loraformat inspect hf://owner/name?"),
    ],
)
def test_a_mistake_is_exit_2_and_says_what_was_meant(
    arguments: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = run(*arguments)
    assert told.exit_code == 2, told.output
    assert said in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_alpha_that_one_adapter_contradicts_does_not_keep_the_others_unchecked() -> None:
    told = run("validate", ADAPTER, BASE.parent / "lora_adapter", "--alpha", "5", "--format", "json", "--isolated")
    assert told.exit_code == 2
    reports = json.loads(told.stdout)["reports"]
    assert [finding["code"] for finding in reports[0]["findings"] if finding["severity"] == "error"] == ["LF024"]
    assert not [finding for finding in reports[1]["findings"] if finding["severity"] == "error"]


def test_a_bare_path_is_told_from_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    told = run("adapter")
    assert told.exit_code == 2
    assert "'adapter' is a path, not a command. Did you mean loraformat inspect adapter?" in told.stderr


def test_a_word_that_is_like_nothing_is_not_guessed_at() -> None:
    told = run("xyzzy")
    assert told.exit_code == 2
    assert "Did you mean" not in told.stderr


def test_help_and_version_are_commands_too() -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("version").stdout == run("--version").stdout == f"loraformat, version {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_that_of_its_option(command: str) -> None:
    assert run("help", command).stdout == run(command, "--help").stdout


@pytest.mark.parametrize("lines", [1, 5, 10])
def test_a_reader_that_goes_away_is_no_fault_of_the_demo(tmp_path: Path, lines: int) -> None:
    """`demo | head`: in the demo's own words, and in the midst of a command."""
    command = [sys.executable, "-m", "loraformat", "demo", "-o", str(tmp_path / "demo")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for _ in range(lines):
            child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1
