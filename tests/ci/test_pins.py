"""constraints.txt and the locks: every Python of the matrix gets one version of a library, and one that it can have."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from pins import CONSTRAINTS, PYTHONS, ROOT, on, requirements, versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCKS = {name: ROOT / ".github" / "lock" / f"{name}.txt" for name in ("core", "build")}
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def needed_by(texts: list[str], extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Name → installed version, of what requirements ask for here and of all that follows from them."""
    found: dict[str, str] = {}
    waiting = [(text, extras) for text in texts]
    seen = set(waiting)
    while waiting:
        text, asked = waiting.pop()
        each = Requirement(text)
        if each.marker is not None and not any(each.marker.evaluate({"extra": extra}) for extra in ("", *asked)):
            continue
        name = canonicalize_name(each.name)
        found[name] = importlib.metadata.version(name)
        more = {(text, frozenset(each.extras)) for text in importlib.metadata.requires(name) or []} - seen
        seen |= more
        waiting += more
    return found


def test_the_pythons_are_those_of_ci() -> None:
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert tuple(ci["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", [CONSTRAINTS, *LOCKS.values()], ids=lambda path: path.stem)
def test_a_python_has_at_most_one_version_of_a_library(path: Path, python: str) -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) for each in requirements(path))
    for system in SYSTEMS:
        assert [name for name, found in versions(path, python, **system).items() if len(found) > 1] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_a_python_can_have_the_versions_that_it_is_given(python: str) -> None:
    """As far as these versions are installed here: the metadata of a distribution says which Pythons it takes."""
    refused = []
    compared = 0
    for name, found in versions(CONSTRAINTS, python).items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found == [distribution.version]:
            compared += 1
            wanted = distribution.metadata.get("Requires-Python", "")
            # A patch release, so that `>=3.11.5` takes 3.11.
            if f"{python}.9" not in SpecifierSet(wanted):
                refused.append(f"{name}=={distribution.version}: {wanted}")
    assert refused == []
    assert compared > 20


@pytest.mark.parametrize("extra", ["test", "dev"])
def test_all_that_an_extra_names_is_pinned_for_every_python(project: dict[str, Any], extra: str) -> None:
    extras = project["project"]["optional-dependencies"]
    waiting, named = [extra], set()
    while waiting:
        for each in map(Requirement, extras[waiting.pop()]):
            if each.name == "loraformat":
                waiting += each.extras
            else:
                named.add(canonicalize_name(each.name))
    for python in PYTHONS:
        assert sorted(named - set(versions(CONSTRAINTS, python))) == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_versions_of_the_constraints(name: str, python: str) -> None:
    for system in SYSTEMS:
        locked = versions(LOCKS[name], python, **system)
        pinned = versions(CONSTRAINTS, python, **system)
        assert locked == {name: pinned.get(name) for name in locked}


def test_all_that_the_core_needs_is_pinned_and_locked(project: dict[str, Any]) -> None:
    """By the metadata of what is installed here, however many libraries lie between."""
    needed = needed_by(project["project"]["dependencies"])
    assert {"safetensors", "filelock", "idna", "mdurl"} <= set(needed)
    pinned, locked = versions(CONSTRAINTS), versions(LOCKS["core"])
    assert sorted(set(needed) - set(pinned)) == []
    assert sorted(set(needed) - set(locked)) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_has_all_that_the_project_names(project: dict[str, Any], python: str) -> None:
    named = {"core": project["project"]["dependencies"], "build": project["build-system"]["requires"]}
    for lock, texts in named.items():
        locked = versions(LOCKS[lock], python)
        for each in map(Requirement, texts):
            if each.marker is None or each.marker.evaluate(on(python)):
                (version,) = locked[canonicalize_name(each.name)]
                assert version in each.specifier


@pytest.mark.parametrize("path", LOCKS.values(), ids=lambda path: path.stem)
def test_a_lock_has_hashes_and_no_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)
    assert len(entries) - 1 == len(requirements(path))
    for entry in entries[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry.splitlines()[0]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_lock_says_how_it_is_made() -> None:
    """With the hashes of all systems, in the versions of the constraints."""
    told = subprocess.run(["make", "-n", "lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in LOCKS.values():
        assert path.read_text(encoding="utf-8").splitlines()[1] == "#    make lock"
        (line,) = [line for line in told.splitlines() if f"--output-file .github/lock/{path.name}" in line]
        assert {"--universal", "--generate-hashes", "--constraint"} <= set(line.split())
