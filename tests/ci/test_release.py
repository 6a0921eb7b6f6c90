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


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a checkout, or no git")
def test_addresses_that_are_missing_stand_only_where_the_table_says(addresses: ModuleType) -> None:
    for missing in addresses.TABLE:
        assert all((ROOT / path).is_file() for path in missing.files)
    stated = {each.placeholder: sorted(each.files) for each in addresses.TABLE if each.placeholder}
    assert {name: files for name, files in addresses.placed().items() if files} in ({}, stated)


def test_the_owner_is_filled_in_everywhere(addresses: ModuleType, tmp_path: Path) -> None:
    for path in addresses.TABLE[0].files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"Both.{addresses._EXPLAINED}\n- uses: OWNER/loraformat@v1\n")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    with pytest.raises(SystemExit, match="not the name of an account"):
        addresses.fill_in("no/owner", tmp_path)
    assert addresses.fill_in("some-one", tmp_path) == sorted(addresses.TABLE[0].files)
    assert addresses.placed(tmp_path) == {"OWNER/loraformat": []}
    assert (tmp_path / "README.md").read_text() == "Both.\n- uses: some-one/loraformat@v1\n"


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
    assert publish["if"] == "github.ref_type == 'tag'"
    assert set(publish["needs"]) == {"check", "wheels"}
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
    core = (ROOT / "tests" / "core_install.py").read_text(encoding="utf-8")
    assert re.findall(r'"python(3\.\d+)"', core.partition("\n\n\n")[0]) == wanted
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
