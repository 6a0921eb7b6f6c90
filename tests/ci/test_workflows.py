"""The workflows and the settings of cibuildwheel: what is built, checked and published, and when."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from scripts import script

import compile_loops

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = "github.event_name == 'push' && github.ref_type == 'tag'"


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cibuildwheel() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]


def scripts(job: dict[str, Any]) -> str:
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_only_a_pushed_tag_publishes() -> None:
    """Also a tag on which somebody starts the workflow by hand does not."""
    release = workflow("release")
    writing = {
        name
        for name, job in release["jobs"].items()
        if {"contents: write", "id-token: write"}
        & {f"{key}: {value}" for key, value in job.get("permissions", {}).items()}
    }
    assert writing == {"publish", "announce"}
    assert {release["jobs"][name]["if"] for name in writing} == {PUBLISHED}


@pytest.mark.parametrize(
    ("tag", "is_released"),
    [("v0.1.0", True), ("v10.20.30", True), ("v1", False), ("v0.1.0rc1", False), ("v0.1.0;x", False), ("0.1.0", False)],
)
def test_a_tag_is_a_version(tag: str, is_released: bool) -> None:
    """In GitHub's patterns `.` is a full stop and `+` repeats the character before it."""
    (pattern,) = workflow("release")[True]["push"]["tags"]  # `on` is a truth value of YAML 1.1
    assert bool(re.fullmatch(pattern.replace(".", r"\."), tag)) is is_released


def test_nothing_is_published_that_was_not_looked_into() -> None:
    jobs = workflow("release")["jobs"]
    assert "inspect" in jobs["publish"]["needs"]
    assert jobs["inspect"]["needs"] == "wheels"
    assert "python release/check.py --published dist" in scripts(jobs["inspect"])
    downloads = [
        step["with"]
        for name in ("inspect", "publish")
        for step in jobs[name]["steps"]
        if "download-artifact" in step.get("uses", "")
    ]
    assert downloads[0] == downloads[1]
    uploads = [
        step["with"]["name"]
        for job in jobs.values()
        for step in job["steps"]
        if "upload-artifact" in step.get("uses", "")
    ]
    assert len(uploads) == 2
    assert all(fnmatch.fnmatch(name, downloads[0]["pattern"]) for name in uploads)


def test_the_release_check_has_what_runs_the_libraries_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    text = scripts(workflow("release")["jobs"]["check"])
    (installed,) = re.findall(r"apt-get install (.+)", text)
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    libraries = script("release/libraries.py")
    required = [libraries.SYSTEMS[name].needs for name in libraries.SYSTEMS.keys() - set(libraries.ELSEWHERE)]
    packages = {name.replace("libc6-dev-", "libc6-") for name in installed.split()}
    assert {"qemu-user", *(package for _, package in filter(None, required))} <= packages


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_tag_is_never_part_of_a_command() -> None:
    for tag in ("v0.1.0", "x; touch owned", "$(touch owned)"):
        command = ["make", "-n", "release-check", f"TAG={tag}"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in told.splitlines() if "release/check.py" in line]
        assert line.endswith("release/check.py")
    for job in workflow("release")["jobs"].values():
        assert "${{" not in scripts(job)


def test_ci_runs_the_action_on_every_system() -> None:
    """A good adapter, and a faulty one that fails."""
    job = workflow("ci")["jobs"]["action"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["system"]} == {"ubuntu", "macos", "windows"}
    for step in job["steps"]:
        if step.get("uses") == "./":
            folder, name = step["with"]["paths"].split("/**/")
            assert list((ROOT / folder).rglob(name))
    assert [step["id"] for step in job["steps"] if step.get("uses") == "./"] == ["good", "faulty"]
    assert [step.get("id") for step in job["steps"] if step.get("continue-on-error")] == ["faulty"]
    assert '"passed, failed, failure"' in job["steps"][-1]["run"]


def test_macos_wheels_are_made_for_the_system_that_the_library_is(cibuildwheel: dict[str, Any]) -> None:
    """delocate compares the library with this variable; cibuildwheel's own value is 10.9 for Python 3.10."""
    environment = cibuildwheel["macos"]["environment"]
    assert environment["MACOSX_DEPLOYMENT_TARGET"] == compile_loops.OLDEST_MACOS["x86_64"]
    # The table of a system replaces the common one.
    assert environment.items() >= cibuildwheel["environment"].items()
    for machine, oldest in compile_loops.OLDEST_MACOS.items():
        target = compile_loops.TARGETS[f"macos-{machine}"]
        assert target.triple.endswith(f"macos.{oldest}")
        assert target.platform == f"macosx_{oldest.replace('.', '_')}_{machine}"


def test_what_builds_and_tries_a_wheel_is_of_the_locks(cibuildwheel: dict[str, Any]) -> None:
    assert cibuildwheel["build-frontend"] == {"name": "pip", "args": ["--no-build-isolation"]}
    for step, lock in (("before-build", "build"), ("before-test", "core")):
        assert f"--require-hashes --only-binary :all: -r {{project}}/.github/lock/{lock}.txt" in cibuildwheel[step]
        assert (ROOT / ".github" / "lock" / f"{lock}.txt").is_file()
    for system in ("linux", "macos", "windows"):
        assert not {"build-frontend", "before-build", "before-test"} & set(cibuildwheel[system])
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()]
    assert "cibuildwheel" in {each.name for each in pins}
    assert "--constraint constraints.txt cibuildwheel" in scripts(workflow("release")["jobs"]["wheels"])
