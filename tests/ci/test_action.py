"""action.yml, run as GitHub runs a composite action: inputs by environment, outputs and summary in files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
BAD = ROOT / "fixtures" / "bad"
GOOD = ROOT / "fixtures" / "good" / "peft"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A repository with one good and one faulty adapter."""
    folder = tmp_path / "repository"
    shutil.copytree(GOOD / "rslora", folder / "adapters" / "good one")
    shutil.copytree(BAD / "LF202-rank-mismatch" / "adapter", folder / "adapters" / "faulty")
    return folder


def run(action: dict[str, Any], workspace: Path, **inputs: str) -> tuple[int, str, dict[str, str], str]:
    """Exit code, log, outputs and summary of the step that validates."""
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == "validate")
    values = {name: each["default"] for name, each in action["inputs"].items()} | {
        name.replace("_", "-"): value for name, value in inputs.items()
    }
    given = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
        for name, text in step["env"].items()
    }
    assert given["LF_PYTHON"] == "${{ steps.environment.outputs.python }}"
    given["LF_PYTHON"] = sys.executable
    scratch = workspace.parent / "runner"
    scratch.mkdir(exist_ok=True)
    files = {name: scratch / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")
    environment = {
        **os.environ,
        **given,
        **{name: str(path) for name, path in files.items()},
        "RUNNER_TEMP": str(scratch),
        "GITHUB_ACTION_PATH": str(ROOT),
    }
    script = scratch / "step.sh"
    script.write_text(step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return done.returncode, done.stdout + done.stderr, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


def test_it_finds_adapters_and_fails_on_a_faulty_one(action: dict[str, Any], workspace: Path) -> None:
    code, log, outputs, summary = run(action, workspace)
    assert code == 1
    assert "::error title=LF202 rank-mismatch,file=adapters/faulty/adapter_model.safetensors,line=1::" in log
    assert outputs["result"] == "failed"
    assert len(json.loads(Path(outputs["json-file"]).read_text())["reports"]) == 2
    assert summary.startswith("### loraformat: 2 adapters: 1 error")


def test_it_finds_adapters_in_loraformats_own_layout(action: dict[str, Any], workspace: Path) -> None:
    shutil.rmtree(workspace / "adapters" / "faulty")
    shutil.copytree(ROOT / "fixtures" / "minigpt" / "lora_adapter", workspace / "adapters" / "native")
    code, log, outputs, _ = run(action, workspace)
    assert code == 1
    assert "LF206" in log
    assert len(json.loads(Path(outputs["json-file"]).read_text())["reports"]) == 2


def test_it_passes_where_nothing_is_wrong(action: dict[str, Any], workspace: Path) -> None:
    code, _, outputs, _ = run(action, workspace, paths="adapters/good one")
    assert (code, outputs["result"]) == (0, "passed")


def test_its_inputs_reach_the_command(action: dict[str, Any], workspace: Path) -> None:
    inputs = {"paths": "adapters/good one", "target": "sglang\nvllm==0.33.0", "max_lora_rank": "64", "deep": "true"}
    code, log, _, _ = run(action, workspace, **inputs, sarif="out.sarif", junit="out.xml")
    assert code == 1
    assert "LF606" in log
    assert json.loads((workspace / "out.sarif").read_text())["version"] == "2.1.0"
    assert (workspace / "out.xml").is_file()
    assert run(action, workspace, paths="adapters/faulty", ignore="LF5 LF202")[0] == 0
    assert run(action, workspace, paths="adapters/faulty", fail_on="never")[0] == 0


def test_paths_without_an_adapter_are_told(action: dict[str, Any], workspace: Path) -> None:
    code, log, outputs, _ = run(action, workspace, paths="models/**/adapter_config.json")
    assert (code, outputs["result"]) == (3, "broken")
    assert "::error" in log


@pytest.mark.parametrize("name", ["paths", "base", "target", "select", "fail_on"])
def test_an_input_is_never_a_command(action: dict[str, Any], workspace: Path, name: str) -> None:
    run(action, workspace, **{name: "$(touch owned) `touch owned` ; touch owned #"})
    assert not (workspace / "owned").exists()


def test_no_input_is_put_into_a_script(action: dict[str, Any]) -> None:
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert step.get("shell", "bash") == "bash"
        assert "run" not in step or "shell" in step


def without_python(scratch: Path) -> Path:
    """A folder for the PATH whose Python always fails: that of the job is not the action's."""
    folder = scratch / "job"
    folder.mkdir(exist_ok=True)
    for name in ("python", "python3", "pip"):
        (folder / name).write_text("#!/bin/sh\nexit 99\n")
        (folder / name).chmod(0o755)
    return folder


def in_the_checkout(action: dict[str, Any], number: int, workspace: Path, **environment: str) -> str:
    """The output of one of the steps before the one that validates, in a folder of the runner or in the checkout."""
    step = action["runs"]["steps"][number]
    scratch = workspace.parent / "runner"
    scratch.mkdir(exist_ok=True)
    folder = step.get("working-directory", str(workspace)).replace("${{ runner.temp }}", str(scratch))
    output = scratch / "output"
    output.write_text("")
    given = {**step.get("env", {}), "RUNNER_TEMP": str(scratch), "GITHUB_OUTPUT": str(output), **environment}
    assert given["LF_PYTHON"] == "${{ steps.python.outputs.python-path }}"
    path = f"{without_python(scratch)}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **given, "LF_PYTHON": sys.executable, "PATH": path}
    script = scratch / "step.sh"
    script.write_text(step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output.read_text() + done.stdout


def test_too_many_paths_for_one_command_are_named_as_the_likely_cause(action: dict[str, Any], workspace: Path) -> None:
    folder = workspace.joinpath(*("d" * 200 for _ in range(4)))
    folder.mkdir(parents=True)
    for number in range(os.sysconf("SC_ARG_MAX") // 800 + 1):
        (folder / f"{number}.safetensors").touch()
    code, log, outputs, _ = run(action, workspace, paths=f"{folder.relative_to(workspace)}/*")
    assert (code, outputs["result"]) == (126, "broken")
    assert "name folders" in log


def test_a_report_of_an_earlier_run_does_not_stay(action: dict[str, Any], workspace: Path) -> None:
    (workspace / "old.xml").write_text("<testsuites/>")
    assert run(action, workspace, junit="old.xml", fail_on="sometimes")[2]["result"] == "broken"
    assert not (workspace / "old.xml").exists()


# Everything that the script imports, and the script, before root becomes somebody to whom a folder can be closed.
AS_NOBODY = """
import __future__, collections.abc, glob, os, re, sys
text = open(sys.argv[1], encoding="utf-8").read()
os.geteuid() or os.setuid(65534)
exec(compile(text, "paths.py", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a system without users of this kind")
def test_a_folder_that_cannot_be_entered_is_left_out() -> None:
    with tempfile.TemporaryDirectory() as name:  # open to all, as pytest's own are not
        top = Path(name)
        (top / "closed" / "sub").mkdir(parents=True)
        (top / "open").mkdir()
        (top / "open" / "f.json").touch()
        (top / "closed").chmod(0o444)
        top.chmod(0o755)
        script = [sys.executable, "-I", "-c", AS_NOBODY, str(ROOT / ".github" / "paths.py")]
        env = {**os.environ, "LF_PATHS": "**/f.json"}
        done = subprocess.run(script, cwd=top, env=env, capture_output=True, check=False)
        (top / "closed").chmod(0o755)
    assert done.stdout == b"open/f.json\0", done.stderr


def installing(action: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that install: what the lock names, then the package itself."""
    return [step for step in action["runs"]["steps"] if " -m pip install " in step.get("run", "")]


PWNED = "import os\nopen(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'PWNED'), 'w').close()\n"


@pytest.fixture
def trap(workspace: Path) -> Path:
    """A checkout that has a module of its own for everything that the action starts or imports."""
    for name in ("pip", "venv", "ensurepip", "loraformat", "click", "json", "encodings", "site"):
        (workspace / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            (workspace / name / file).write_text(PWNED)
    (workspace / "sitecustomize.py").write_text(PWNED)
    (workspace / "usercustomize.py").write_text(PWNED)
    return workspace


def test_nothing_of_the_checkout_is_imported(action: dict[str, Any], trap: Path) -> None:
    names = [step.get("name") for step in action["runs"]["steps"]]
    content = names.index("Name what is installed")
    told = in_the_checkout(action, content, trap, PYTHONPATH=str(trap), GITHUB_ACTION_PATH=str(ROOT))
    digest = told.strip().removeprefix("digest=")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    making = names.index("Make an environment outside the checkout")
    told = in_the_checkout(action, making, trap, PYTHONPATH=str(trap), LF_DIGEST=digest)
    python, is_complete = (line.partition("=")[2] for line in told.split())
    assert is_complete == "false"
    assert Path(python).is_relative_to(trap.parent / "runner")
    asked = {"PIP_PYTHON": python, "PYTHONPATH": str(trap), "GITHUB_ACTION_PATH": "/nowhere"}
    for install in installing(action):
        assert install["env"]["PIP_PYTHON"] == "${{ steps.environment.outputs.python }}"
        version = {**install, "run": re.sub(r" install .*", " --version", install["run"])}
        assert in_the_checkout({"runs": {"steps": [version]}}, 0, trap, **asked).startswith("pip ")
    (trap / "adapters" / "faulty").rename(trap.parent / "faulty")
    code, log, _, _ = run(action, trap)
    assert code == 0, log
    assert not list(trap.rglob("PWNED"))


@pytest.mark.parametrize(("runs", "is_complete"), [('exec {python} "$@"', "true"), ("exit 1", "false")])
def test_an_environment_out_of_the_cache_is_used_if_it_runs(
    action: dict[str, Any], workspace: Path, runs: str, is_complete: str
) -> None:
    names = [step.get("name") for step in action["runs"]["steps"]]
    python = workspace.parent / "runner" / "loraformat-abc" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{runs.format(python=sys.executable)}\n")
    python.chmod(0o755)
    making = names.index("Make an environment outside the checkout")
    printed = in_the_checkout(action, making, workspace, LF_DIGEST="abc")
    assert printed.split() == [f"python={python}", f"is-complete={is_complete}"]
    assert {step["if"] for step in installing(action)} == {"steps.environment.outputs.is-complete != 'true'"}


def test_only_files_of_the_lock_are_installed(action: dict[str, Any]) -> None:
    others, own = (step["run"] for step in installing(action))
    assert {"--require-hashes", "--only-binary"} <= set(others.split())
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(own.split())
    assert {Path(name).name for name in re.findall(r'/lock/([^"]+)"', others)} == {
        path.name for path in (ROOT / ".github" / "lock").iterdir()
    }
    assert {step["working-directory"] for step in installing(action)} == {"${{ runner.temp }}"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_installs_itself(action: dict[str, Any], workspace: Path) -> None:
    """All of its own steps; variables of the caller that would change what is installed are without effect."""
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(workspace.parent), "click"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        assert "No matching distribution found" in done.stderr, done.stderr
        pytest.skip("no package registry can be reached")
    names = [step.get("name") for step in action["runs"]["steps"]]
    making = names.index("Make an environment outside the checkout")
    printed = in_the_checkout(action, making, workspace, LF_DIGEST="abc")
    python = printed.split()[0].removeprefix("python=")
    caller = {"PIP_PYTHON": python, "PIP_CONSTRAINT": "/nowhere", "PIP_BUILD_CONSTRAINT": "/nowhere"}
    for step in installing(action):
        number = action["runs"]["steps"].index(step)
        in_the_checkout(action, number, workspace, GITHUB_ACTION_PATH=str(ROOT), **caller)
    assert "is-complete=true" in in_the_checkout(action, making, workspace, LF_DIGEST="abc")
    asked = [python, "-I", "-m", "loraformat", "validate", str(workspace / "adapters" / "faulty")]
    checked = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "LF202" in checked.stdout


def test_later_steps_keep_the_python_of_the_job(action: dict[str, Any]) -> None:
    (setup,) = (step for step in action["runs"]["steps"] if step.get("id") == "python")
    assert setup["with"]["update-environment"] is False
    for step in action["runs"]["steps"]:
        assert not re.search(r"(^|[\s;&|(])(python3?|pip3?) -", step.get("run", ""), re.MULTILINE)


@pytest.mark.parametrize(
    ("changed", "is_another"),
    [
        (".github/lock/core.txt", True),
        ("pyproject.toml", True),
        ("loraformat/cli/__init__.py", True),
        ("docs/cli.md", False),
        ("loraformat/__pycache__/x.pyc", False),
    ],
)
def test_what_is_installed_is_named_by_its_content(
    action: dict[str, Any], tmp_path: Path, changed: str, is_another: bool
) -> None:
    """The key of the cache has this name, the version of Python and the system."""
    source = tmp_path / "action"
    for name in (".github/lock/core.txt", "pyproject.toml", "loraformat/cli/__init__.py", "schemas/report.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("before\n")
    names = [step.get("name") for step in action["runs"]["steps"]]
    naming = names.index("Name what is installed")
    before = in_the_checkout(action, naming, source, GITHUB_ACTION_PATH=str(source))
    (source / changed).parent.mkdir(parents=True, exist_ok=True)
    (source / changed).write_text("after\n")
    after = in_the_checkout(action, naming, source, GITHUB_ACTION_PATH=str(source))
    assert (before != after) is is_another
    keys = {step["with"]["key"] for step in action["runs"]["steps"] if "actions/cache/" in step.get("uses", "")}
    (key,) = keys
    for part in ("runner.os", "runner.arch", "steps.python.outputs.python-version", "steps.content.outputs.digest"):
        assert f"${{{{ {part} }}}}" in key


@pytest.mark.parametrize("path", ["action.yml", *(f".github/workflows/{p.name}" for p in WORKFLOWS)])
def test_actions_of_others_are_pinned_by_the_whole_hash_of_a_commit(path: str) -> None:
    """A tag can be moved by whoever holds the account; the comment says which release the commit is."""
    lines = [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if "uses:" in line]
    lines = [line for line in lines if not line.endswith("uses: ./")]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_a_path_that_looks_like_an_option_is_a_path(action: dict[str, Any], workspace: Path) -> None:
    (workspace / "adapters" / "good one").rename(workspace / "--report=json=victim")
    code, log, _, _ = run(action, workspace, paths="--report=*")
    assert code == 0, log
    assert not (workspace / "victim").exists()


def test_sarif_is_uploaded_only_if_it_was_written(action: dict[str, Any], workspace: Path) -> None:
    upload = action["runs"]["steps"][-1]
    assert upload["if"] == "${{ !cancelled() && steps.validate.outputs.has-sarif == 'true' }}"
    assert upload["with"]["sarif_file"] == "${{ inputs.sarif }}"
    outside = str(workspace.parent / "out of the checkout.sarif")
    for sarif in ("out.sarif", outside):
        assert run(action, workspace, sarif=sarif)[2]["has-sarif"] == "true"
    assert "has-sarif" not in run(action, workspace)[2]
    assert "has-sarif" not in run(action, workspace, sarif="never.sarif", paths="models/**")[2]
    assert "has-sarif" not in run(action, workspace, sarif="never.sarif", fail_on="sometimes")[2]
    (workspace / "old.sarif").write_text("{}")
    assert "has-sarif" not in run(action, workspace, sarif="old.sarif", fail_on="sometimes")[2]


def test_a_second_use_in_a_job_keeps_the_report_of_the_first(action: dict[str, Any], workspace: Path) -> None:
    first = Path(run(action, workspace)[2]["json-file"])
    report = first.read_bytes()
    second = run(action, workspace, fail_on="sometimes")[2]
    assert second["result"] == "broken"
    assert "json-file" not in second
    assert first.read_bytes() == report


PATTERNS = """\
**/f.json
a/*/f.json
a/**
a/**/
**
nothing/**/f.json
literal that is missing

a/good one
a/b*/**/f.json
link/**/f.json
a/.*/f.json
./**/f.json
*/**/c/*
**/**/f.json
a/br[[]1]/*
a**/f.json
**/lc/f.json
**/lc/**/f.json
a/*.json
**/good*
?/b
a/[bg]*/f.json
"""


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need a privilege")
def test_patterns_match_what_bash_matches_with_globstar(tmp_path: Path) -> None:
    """Which the bash of macOS, version 3.2, does not have."""
    command = "shopt -s globstar nullglob; IFS=$'\\n'; found=($LF_PATHS); printf '%s\\0' \"${found[@]}\""
    tree = tmp_path / "tree"
    for folder in (".", "a/good one", "a/.hidden/x", "a/b/c", "a/br[1]", ".top/z", "empty"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
        if folder != "empty":
            (tree / folder / "f.json").touch()
    for name in ("a/f.json", "a/.dot.json", "a/b/new\nline", "a/b/f.json"):
        (tree / name).touch()
    for link, target in (("a/loop", "../a"), ("link", "a"), ("a/lc", "b/c"), ("a/gone", "nowhere"), ("a/own", "own")):
        (tree / link).symlink_to(target)
    env = {**os.environ, "LF_PATHS": PATTERNS, "LC_ALL": "C"}
    bash = subprocess.run(["bash", "-c", command], cwd=tree, env=env, capture_output=True, check=False)
    if b"globstar" in bash.stderr:
        pytest.skip("this bash has no globstar to compare with")
    script = [sys.executable, "-I", str(ROOT / ".github" / "paths.py")]
    ours = subprocess.run(script, cwd=tree, env=env, capture_output=True, check=True)
    found = ours.stdout.split(b"\0")
    assert found == bash.stdout.split(b"\0")
    assert {b"a/good one/f.json", b"a/b/new\nline", b"literal that is missing"} <= set(found)


def test_links_that_lead_back_do_not_make_a_pattern_endless(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"back{number}").symlink_to(".", target_is_directory=True)
    script = [sys.executable, "-I", str(ROOT / ".github" / "paths.py")]
    env = {**os.environ, "LF_PATHS": "**/adapter_config.json\n./**/**/adapter_config.json"}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, check=True, timeout=60)
    assert done.stdout == b""


BASH_4 = r"globstar|mapfile|readarray|coproc|declare -\w*A|local -\w*A|\$\{\w+[\^,@]|&>>|\|&|;&|\[\[ -v|wait -n"


@pytest.mark.parametrize("path", ["action.yml", *(f".github/workflows/{p.name}" for p in WORKFLOWS)])
def test_scripts_need_no_newer_bash_than_macos_has(path: str) -> None:
    document = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    jobs = [document["runs"]] if "runs" in document else list(document["jobs"].values())
    scripts = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert scripts
    for script in scripts:
        assert not re.search(BASH_4, script)
