"""What a release is made of: addresses that are missing, wheels for each platform, the configuration of the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from scripts import script

import compile_loops

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def addresses() -> ModuleType:
    return script("release/addresses.py")


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    return script("release/contents.py")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    return script("release/libraries.py")


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a checkout, or no git")
def test_addresses_that_are_missing_stand_only_where_the_table_says(addresses: ModuleType) -> None:
    for missing in addresses.TABLE:
        assert all((ROOT / path).is_file() for path in missing.files)
    stated = {each.placeholder: sorted(each.files) for each in addresses.TABLE if each.placeholder}
    assert {name: files for name, files in addresses.placed().items() if files} in ({}, stated)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_owner_is_filled_in_everywhere(addresses: ModuleType, tmp_path: Path) -> None:
    """In copies of the files themselves, which then say nothing more about the time before the first release."""
    pages = {*addresses.TABLE[0].files, "docs/index.md"}
    for path in pages:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    with pytest.raises(SystemExit, match="not the name of an account"):
        addresses.fill_in("no/owner", tmp_path)
    is_missing = bool(addresses.placed(tmp_path)["OWNER/loraformat"])
    assert addresses.fill_in("some-one", tmp_path) == (sorted(pages) if is_missing else [])
    assert addresses.placed(tmp_path) == {"OWNER/loraformat": []}
    assert addresses.early(tmp_path) == []
    for path in pages:
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert not re.search(r"\bOWNER\b(?!:)|not on PyPI yet|<!-- (before|end)", text), path
    assert "pip install loraformat" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_what_git_cannot_search_is_an_error(addresses: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="git grep"):
        addresses.placed(tmp_path)


SHOWN = 'is consistent with\nthe following platform tag: "{}".\n\nThe wheel references external versioned symbols'


@pytest.mark.parametrize(
    ("tag", "found", "is_taken"),
    [
        ("manylinux2014_x86_64.manylinux_2_17_x86_64", "manylinux_2_17_x86_64", True),
        ("manylinux2014_x86_64.manylinux_2_17_x86_64", "manylinux_2_5_x86_64", True),
        ("manylinux2014_x86_64.manylinux_2_17_x86_64", "manylinux_2_34_x86_64", False),
        ("manylinux2014_aarch64.manylinux_2_17_aarch64", "manylinux_2_17_x86_64", False),
        ("manylinux2014_x86_64.manylinux_2_17_x86_64", "linux_x86_64", False),
        ("linux_x86_64", "manylinux_2_17_x86_64", False),
    ],
)
def test_a_wheel_that_needs_a_newer_system_than_its_name_says(
    contents: ModuleType, tag: str, found: str, *, is_taken: bool
) -> None:
    name = f"loraformat-0.1.0-py3-none-{tag}.whl"
    if is_taken:
        assert contents.needed_system(name, SHOWN.format(found)) == found
    else:
        with pytest.raises(contents.Failed, match=f"needs {found}"):
            contents.needed_system(name, SHOWN.format(found))


def test_what_is_uploaded_is_complete_and_nothing_else(contents: ModuleType, tmp_path: Path) -> None:
    version = contents.version()
    tags = [target.platform for target in compile_loops.TARGETS.values()]
    whole = [Path(f"loraformat-{version}-py3-none-{tag}.whl") for tag in ("any", *tags)]
    whole.append(Path(f"loraformat-{version}.tar.gz"))
    contents.check_set(whole)
    for paths in (whole[1:], whole[:-1], [*whole, whole[2]], [*whole, tmp_path / "notes.txt"]):
        with pytest.raises(contents.Failed, match="expected macosx arm64"):
            contents.check_set(paths)


def test_a_library_is_not_run_where_its_system_is_missing(libraries: ModuleType) -> None:
    assert set(libraries.SYSTEMS) <= set(compile_loops.TARGETS)
    assert {target for target in compile_loops.TARGETS if "macos" in target} == {
        target for target in compile_loops.TARGETS if libraries.why_not(target) == "no emulator of its system"
    }
    for target, system in libraries.SYSTEMS.items():
        if system.command:
            assert libraries.why_not(target, which=lambda _: None).startswith(("no ", "needs Linux"))


def test_a_release_needs_what_runs_each_library(libraries: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(libraries.missing(which=lambda _: None))
    assert "windows-x86_64: " in said
    assert "manylinux-aarch64: " in said
    assert "macos" not in said
    monkeypatch.setitem(libraries.TARGETS, "plan9-x86_64", compile_loops.TARGETS["windows-x86_64"])
    assert "plan9-x86_64: no emulator of its system" in libraries.missing()


def test_a_tag_is_refused_before_anything_is_built_where_a_library_cannot_run(
    libraries: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = script("release/check.py")
    monkeypatch.setitem(libraries.TARGETS, "plan9-x86_64", compile_loops.TARGETS["windows-x86_64"])
    release = check.Release(tmp_path, tmp_path, "v0.1.0", [])
    first = release.steps()[0][1]
    with pytest.raises(check.Failed, match="plan9-x86_64: no emulator"):
        first()


def test_every_platform_of_the_issue_has_a_target() -> None:
    systems = {each.platform.rpartition(".")[2] for each in compile_loops.TARGETS.values()}
    assert systems == {
        "manylinux_2_17_x86_64",
        "manylinux_2_17_aarch64",
        "musllinux_1_2_x86_64",
        "musllinux_1_2_aarch64",
        "macosx_10_13_x86_64",
        "macosx_11_0_arm64",
        "win_amd64",
    }
    assert {each.machine for each in compile_loops.TARGETS.values()} == set(compile_loops.LOOPS)


def test_links_of_the_first_page_are_absolute_on_pypi() -> None:
    """The substitution of pyproject.toml, done to README.md."""
    (pattern,) = re.findall(r"^pattern = '(.+)'$", TEXT, re.MULTILINE)
    (replacement,) = re.findall(r"^replacement = '(.+)'$", TEXT, re.MULTILINE)
    text = re.sub(pattern, replacement, (ROOT / "README.md").read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert replacement[2:].replace("\\1)", "docs/benchmarks.md") in links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_only_the_job_that_publishes_may_ask_for_an_identity(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    asking = {name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})}
    assert asking == {"publish"}
    publish = workflow["jobs"]["publish"]
    assert publish["environment"]["name"] == "pypi"
    assert (
        publish["if"] == workflow["jobs"]["announce"]["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    )
    assert set(publish["needs"]) == {"check", "wheels", "inspect"}
    assert workflow["jobs"]["inspect"]["needs"] == "wheels"
    assert "password" not in str(workflow)


def test_a_hash_that_its_repository_has_not_confirmed_is_in_the_table(addresses: ModuleType) -> None:
    confirmed = {
        "actions/attest-build-provenance@e8998f949152b193b063cb0ec769d69d929409be",
        "actions/checkout@34e114876b0b11c390a56381ad16ebd13914f8d5",
        "actions/download-artifact@d3f86a106a0bac45b974a628896c90dbdf5c8093",
        "actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065",
        "actions/upload-artifact@ea165f8d65b6e75b540449e92b4886f43607fa02",
    }
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    others = set(re.findall(r"uses: (\S+)", text)) - confirmed
    assert len(others) == 1
    for name in others:
        assert any(name.partition("@")[0] in each.what for each in addresses.TABLE)


def test_versions_of_python_are_the_same_everywhere() -> None:
    wanted = [f"3.{minor}" for minor in range(10, 15)]
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', TEXT) == wanted
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == wanted
    assert [f"python{each}" for each in wanted] == list(script("tests/core_install.py").PYTHONS)
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    (set_up,) = (step for step in release["jobs"]["check"]["steps"] if "setup-python" in step.get("uses", ""))
    assert sorted(set_up["with"]["python-version"].split()) == sorted(wanted)
    built = re.findall(r"cp(3)(\d+)-", TEXT.partition("[tool.cibuildwheel]")[2].partition("\n[tool.")[0])
    assert [f"{major}.{minor}" for major, minor in built] == [wanted[0], "3.12", wanted[-1]]
    assert f'requires-python = ">={wanted[0]}"' in TEXT


@pytest.mark.skipif(sys.platform == "win32", reason="a program is a script of sh here")
def test_a_target_is_compiled_by_zig_for_its_oldest_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy zig writes down what it was asked for."""
    zig = tmp_path / "zig"
    zig.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nfor last; do :; done\nout=\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && out="$2"; shift; done\n: > "$out"\n'
    )
    zig.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    compile_loops.compile_for(compile_loops.TARGETS["macos-arm64"], tmp_path / "_kernel.so")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 3
    assert all(line.startswith("cc -target aarch64-macos.11.0 ") for line in asked)
    assert all("-ffp-contract=fast" in line for line in asked[:2])
    assert "-install_name,@rpath/_kernel.so" in asked[2]


def test_without_zig_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="pip install ziglang"):
        compile_loops.compile_for(compile_loops.TARGETS["windows-x86_64"], tmp_path / "_kernel.so")
