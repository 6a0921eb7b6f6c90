"""The pre-commit hook, as somebody else's repository uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
BAD = ROOT / "fixtures" / "bad" / "LF202-rank-mismatch" / "adapter"
GOOD = ROOT / "fixtures" / "good" / "peft" / "rslora"
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.skipif(not (BIN / "pre-commit").exists(), reason="pre-commit is not installed"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]


def environment(home: Path) -> dict[str, str]:
    identity = {
        f"GIT_{who}_{what}": "nobody@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return {**kept, **identity, **constraints, **path, "PRE_COMMIT_HOME": str(home)}


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = environment(folder.parent / "cache")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A stranger's repository with an adapter, a text, and nothing committed yet."""
    folder = tmp_path / "stranger"
    shutil.copytree(GOOD, folder / "adapters" / "good")
    (folder / "notes.md").write_text("nothing\n")
    assert call(folder, "git", "init", "--quiet").returncode == 0
    assert call(folder, "git", "add", ".").returncode == 0
    return folder


def with_fault(repository: Path) -> None:
    shutil.copytree(BAD, repository / "adapters" / "faulty")
    assert call(repository, "git", "add", ".").returncode == 0


def test_the_hook_checks_what_was_changed(repository: Path) -> None:
    """Its entry and its choice of files, with the loraformat that is installed."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    config = {"repos": [{"repo": "local", "hooks": [{**hook, "language": "system"}]}]}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    assert call(repository, "git", "add", ".").returncode == 0
    passed = call(repository, "pre-commit", "run")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    with_fault(repository)
    failed = call(repository, "pre-commit", "run")
    assert failed.returncode == 1
    assert "adapters/faulty: model.layers.0.self_attn.q_proj.weight: error[LF202]" in failed.stdout
    assert "2 adapters: 1 error" in failed.stdout
    only_text = call(repository, "pre-commit", "run", "--files", "notes.md")
    assert "no files to check" in only_text.stdout


@pytest.mark.parametrize("args", [None, ["--target", "vllm", "--"], ["--target", "vllm"]])
def test_a_folder_named_like_an_option_is_never_one(repository: Path, args: list[str] | None) -> None:
    """With the hook's own args, with args as the README has them, and where somebody forgot the last of them."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    asked = {**hook, "language": "system", **({} if args is None else {"args": args})}
    (repository / ".pre-commit-config.yaml").write_text(
        yaml.safe_dump({"repos": [{"repo": "local", "hooks": [asked]}]})
    )
    shutil.copytree(GOOD, repository / "--report=json=victim")
    assert call(repository, "git", "add", ".").returncode == 0
    done = call(repository, "pre-commit", "run")
    assert not (repository / "victim").exists()
    assert "No such option" not in done.stdout
    if args and args[-1] != "--":
        assert done.returncode == 1
        assert "put -- before paths" in done.stdout
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 adapters: OK" in done.stdout + call(repository, "pre-commit", "run", "--verbose").stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_hook_installs_itself(repository: Path) -> None:
    """All of it: pre-commit clones this repository and installs it from a package registry."""
    probe = call(
        repository, str(BIN / "python"), "-m", "pip", "download", "--quiet", "--no-deps", "-d", ".probe", "click"
    )
    if probe.returncode != 0:
        assert "No matching distribution found" in probe.stderr, probe.stderr
        pytest.skip("no package registry can be reached")
    shutil.rmtree(repository / ".probe")
    passed = call(repository, "pre-commit", "try-repo", str(ROOT), "loraformat-validate", "--all-files", "--verbose")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "1 adapter: OK" in passed.stdout
    with_fault(repository)
    failed = call(repository, "pre-commit", "try-repo", str(ROOT), "loraformat-validate", "--all-files")
    assert failed.returncode == 1
    assert "error[LF202]" in failed.stdout
