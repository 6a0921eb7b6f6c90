"""Completion as the shells ask for it, and the whole of it in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraformat.cli import COMMANDS, main
from loraformat.cli.commands.completion import SHELLS
from loraformat.formats import FORMATS

BIN = Path(sys.executable).parent


def completed(*words: str) -> list[str]:
    """What is offered for the last word, as `type,word`, the way click's script for bash asks."""
    asked = {
        "_LORAFORMAT_COMPLETE": "bash_complete",
        "COMP_WORDS": "\n".join(("loraformat", *words)),
        "COMP_CWORD": str(len(words)),
    }
    return CliRunner(env=asked).invoke(main, [], prog_name="loraformat").stdout.splitlines()


WRITTEN = [each.NAME for each in FORMATS if each.WRITES]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_every_shell_asks_this_program(shell: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell])
    assert script.exit_code == 0
    assert f"_LORAFORMAT_COMPLETE={shell}_complete" in script.stdout


def test_another_shell_is_a_mistake_of_usage() -> None:
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ins"], ["plain,inspect"]),
        (["help", "ver"], ["plain,verify", "plain,version"]),
        (["completion", ""], ["plain,bash", "plain,zsh", "plain,fish"]),
        (["convert", "x", "--to", ""], [f"plain,{name}" for name in WRITTEN]),
        (["convert", "x", "--from", "lit"], ["plain,litgpt"]),
        (["validate", "x", "--target", "vl"], ["plain,vllm"]),
        (["validate", "x", "--select", "LF20"], [f"plain,LF20{n}" for n in range(1, 9)]),
        (["validate", "x", "--ignore", "lf105"], ["plain,LF105"]),
        (["validate", "x", "--report", "js"], ["plain,json=", "plain,jsonl="]),
        (["validate", "x", "--format", "gitl"], ["plain,gitlab"]),
        (["explain", "LF105"], ["plain,LF105"]),
        (["explain", "vl"], ["plain,vllm"]),
        (["merge", "base", "--rounding", "st"], ["plain,stochastic"]),
        (["convert", "x", "--base-m"], ["plain,--base-model"]),
    ],
)
def test_words_are_completed_by_what_they_may_be(words: list[str], offered: list[str]) -> None:
    assert completed(*words) == offered


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "./ad"],
        ["validate", "one", "./ad"],
        ["convert", "./ad"],
        ["merge", "./ba"],
        ["merge", "base", "./ad"],
        ["verify", "./ad"],
        ["diff", "one", "./ad"],
        ["plot", "./ad"],
        ["validate", "x", "--base", "./ba"],
        ["convert", "x", "-o", "./ad"],
        ["validate", "x", "--config", "./ad"],
    ],
)
def test_paths_are_left_to_the_shell(words: list[str]) -> None:
    assert completed(*words) == [f"file,{words[-1]}"]


def test_every_command_is_offered() -> None:
    assert completed("") == [f"plain,{name}" for name in COMMANDS]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_it_works_in_bash() -> None:
    ask = """
        eval "$(loraformat completion bash)"
        COMP_WORDS=(loraformat convert x --to pe) COMP_CWORD=4
        _loraformat_completion loraformat
        printf '%s\\n' "${COMPREPLY[@]}"
        complete -p loraformat
    """
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, env=environment, check=False)
    offered, declared = done.stdout.splitlines()
    assert (offered, done.stderr) == ("peft", "")
    assert declared.endswith("-F _loraformat_completion loraformat")
