"""Names that strangers chose, on the command line and in files: what is printed in any encoding, what is obeyed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hostile import CONFIG, factors, peft, safetensors

from loraformat.cli import main
from loraformat.report import FORMS

COMMANDS = "::set-output name=r::x ##[error]y ##vso[task.z] ##teamcity[t]"
PREFIX = "base_model.model."
NAMES = [f"::warning::{number} {COMMANDS}.q_proj" for number in range(2)]


def run(folder: Path, *arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The tool in a process of its own."""
    command: list[str | bytes] = [sys.executable, "-m", "loraformat", *arguments]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False, stdin=subprocess.DEVNULL)


def call(folder: Path, *arguments: str, charset: str = "utf-8") -> Result:
    """The tool in this process, started in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return CliRunner(charset=charset).invoke(main, arguments)
    finally:
        os.chdir(before)


def commands(text: str) -> list[str]:
    """The lines in which a CI system finds a command that is not ours."""
    own = ("::error ", "::warning ", "::notice ")
    return [
        line
        for line in text.splitlines()
        if re.search(r"##\w*\[", line) or ("::" in line and not (line.startswith(own) and line.count("::") == 2))
    ]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An adapter and a base whose names, values and settings are commands, and a pickle with more of them."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "base").mkdir()
    entries = {}
    for name in NAMES:
        entries[f"{PREFIX}{name}.lora_A.weight"] = ("F32", [2, 4], 32)
        entries[f"{PREFIX}{name}.lora_B.weight"] = ("F32", [4, 2], 32)
    config = {
        "base_model_name_or_path": COMMANDS,
        "task_type": COMMANDS,
        COMMANDS: COMMANDS,
        "target_modules": COMMANDS,
    }
    peft(tmp_path / "adapter", safetensors(entries), config)
    (tmp_path / "adapter" / "README.md").write_text(f"---\nbase_model: {COMMANDS!r}\nlicense: {COMMANDS!r}\n---\n")
    base = {f"{name}.weight": ("F32", [4, 4], 64) for name in [*NAMES[:1], f"x.{COMMANDS}"]}
    (tmp_path / "base" / "model.safetensors").write_bytes(safetensors(base))
    (tmp_path / "base" / "config.json").write_text('{"model_type": "##[error]x"}')
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        *(["validate", "adapter", "--base", "base", "--deep", "--format", form] for form in FORMS),
        ["inspect", "adapter", "--base", "base", "--norms"],
        ["inspect", "adapter", "--norms", "--heat", "--group", "module", "--format", "json"],
        ["inspect", "adapter", "adapter", "--spectrum", "--group", "module"],
        ["convert", "adapter", "--to", "native", "-o", "::out::x ##[y]"],
        ["convert", "adapter", "--to", "::mlx::", "-o", "out"],
        ["merge", "base", "adapter", "-o", "out"],
        ["merge", "base", "::a::=##[b]", "-o", "out"],
        ["diff", "adapter", "adapter"],
        ["diff", "base", "base", "--format", "json"],
        ["plot", "adapter", "-o", "##[a]::b::.html"],
        ["estimate", "base", "--rank", "2", "--targets", "::a::,##[b]"],
        ["verify", "##vso[a]"],
        ["explain", "::error::x"],
        ["validate", "--::error::x"],
        ["validate", "adapter", "--fail-on", "##[x]"],
        ["validate", "adapter", "--target", "##[x]"],
        ["validate", "adapter", "--select", "##[x]"],
        ["validate", "adapter", "--config", "##[x]"],
        ["::add-mask::x"],
        ["inspect", "::add-mask::x"],
    ],
    ids=" ".join,
)
def test_no_verb_prints_a_command_of_a_ci_system(hostile: Path, arguments: list[str]) -> None:
    done = call(hostile, *arguments)
    assert done.exit_code in (0, 1, 2, 3)
    assert commands(done.output) == []


@pytest.fixture
def accented(tmp_path: Path) -> Path:
    """An adapter and its base whose names have letters that few encodings have."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    peft(tmp_path / "a", factors(f"{PREFIX}model.\u00e9\u6a21.q_proj"), {"base_model_name_or_path": "\u6a21/\u578b"})
    (tmp_path / "b" / "model.safetensors").write_bytes(
        safetensors({"model.\u00e9\u6a21.q_proj.weight": ("F32", [4, 4], 64)})
    )
    (tmp_path / "b" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("charset", ["ascii", "cp1252", "utf-16"])
@pytest.mark.parametrize(
    "arguments",
    [
        *(["validate", "a", "--base", "b", "--format", form, "--report", f"{form}=out.txt"] for form in FORMS),
        ["inspect", "a", "--norms", "--heat"],
        ["inspect", "a", "--norms", "--format", "json"],
        ["merge", "b", "a", "-o", "out"],
        ["convert", "a", "--to", "native", "-o", "out"],
        ["diff", "a", "a"],
        ["plot", "a", "-o", "out.html"],
        ["validate", "\u6a21\u578b"],
        ["inspect", "--help"],
        ["merge", "--help"],
        ["formats"],
        ["explain", "LF803"],
    ],
    ids=" ".join,
)
def test_what_an_encoding_lacks_is_escaped(accented: Path, arguments: list[str], charset: str) -> None:
    done = call(accented, *arguments, charset=charset)
    assert done.exit_code in (0, 1, 3), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    if (accented / "out.txt").exists():
        (accented / "out.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=lambda environment: next(iter(environment)),
)
@pytest.mark.parametrize("verb", [["validate", "a", "--base", "b"], ["merge", "b", "a", "-o", "out"]], ids=" ".join)
def test_a_process_says_what_its_locale_lacks(accented: Path, verb: list[str], environment: dict[str, str]) -> None:
    done = run(accented, *verb, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize("form", ["text", "json", "junit", "sarif", "gitlab"])
def test_a_folder_whose_name_is_latin_1_is_reported_in_every_form(tmp_path: Path, form: str) -> None:
    name = b"caf\xe9"
    os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    peft(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))), config={**CONFIG, "r": 3})
    done = run(tmp_path, "validate", name, "--format", form, "--report", f"{form}=out.txt")
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "out.txt").read_bytes() == done.stdout
    assert b"LF2" in done.stdout
    done.stdout.decode("utf-8")
    missing = run(tmp_path, "validate", b"caf\xe8", "--format", form)
    assert missing.returncode == 3
    assert b"caf\\udce8: no such file or folder" in missing.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "--norms", "--format", "json"],
        ["convert", "--to", "native", "-o", b"out\xe9"],
        ["plot", "-o", b"out\xe9.html"],
        ["plot", "-o", b"out\xe9.svg"],
        ["diff", b"caf\xe9"],
    ],
    ids=str,
)
def test_a_latin_1_name_is_no_bug_of_any_verb(tmp_path: Path, arguments: list[str | bytes]) -> None:
    name = b"caf\xe9"
    os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    peft(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))))
    done = run(tmp_path, arguments[0], name, *arguments[1:])
    assert done.returncode == 0, done.stderr
    done.stdout.decode("utf-8")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "0x10", "1_0", "\u0661", "", "9" * 500])
@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["convert", "a", "--to", "native", "-o", "out", "--alpha"], "--alpha"),
        (["merge", "b", "a", "-o", "out", "--alpha"], "--alpha"),
        (["inspect", "a", "--norms", "--alpha"], "--alpha"),
        (["diff", "a", "a", "--tol"], "--tol"),
        (["merge", "b", "a", "-o", "out", "--memory"], "--memory"),
        (["merge", "b", "a", "-o", "out", "--max-shard-size"], "--max-shard-size"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_number_that_is_none_is_a_fault_of_the_option(
    tmp_path: Path, arguments: list[str], option: str, value: str
) -> None:
    done = call(tmp_path, *arguments, value)
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "[" * 100_000, ""], ids=lambda value: value[:9]
)
@pytest.mark.parametrize("key", ["alpha", "scale", "rank"])
def test_an_assumption_that_is_no_number_is_a_fault_of_the_option(tmp_path: Path, key: str, value: str) -> None:
    done = call(tmp_path, "convert", "a", "--to", "native", "-o", "out", "--assume", f"{key}={value}")
    assert done.exit_code == 2
    assert "Invalid value for '--assume'" in done.stderr


def test_the_trace_that_debugging_asks_for_is_safe_to_print(tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", "::error::x##[y]\x1b[2J", LORAFORMAT_DEBUG="1")
    assert done.returncode == 3
    assert b"StorageError" in done.stderr
    assert b"\x1b" not in done.stderr
    assert commands(done.stderr.decode()) == []


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("verb", "expected"), [("validate", 1), ("inspect", 0), ("formats", 0)])
def test_a_closed_stream_changes_no_verdict(tmp_path: Path, closed: str, verb: str, expected: int) -> None:
    (tmp_path / "a").mkdir()
    peft(tmp_path / "a", config={"lora_alpha": None})
    subject = "" if verb == "formats" else "a"
    script = f"{shlex.quote(sys.executable)} -m loraformat {verb} {subject} {closed}"
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, check=False).returncode == expected


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_a_path_that_looks_like_an_option_is_never_one(tmp_path: Path, verb: str) -> None:
    """As a hook gives it: a folder called `--report=json=victim`, with a file of an adapter in it."""
    folder = tmp_path / "--report=json=victim"
    folder.mkdir()
    (tmp_path / "a").mkdir()
    peft(folder)
    peft(tmp_path / "a")
    name = "--report=json=victim/adapter_config.json"
    refused = run(tmp_path, verb, "a", name)
    assert refused.returncode == 2
    assert b"put -- before paths" in refused.stderr
    assert not (tmp_path / "victim").exists()
    assert run(tmp_path, verb, "a", "--", "--report=json=victim").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["--report=json=victim", "a"]
