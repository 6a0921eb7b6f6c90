"""The versions of constraints.txt and of the locks, for any Python and system."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = tuple(f"3.{minor}" for minor in range(10, 15))


def requirements(path: Path) -> list[Requirement]:
    """What a file for pip lists, without comments and hashes."""
    text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [Requirement(re.sub(r"\s--hash=\S+", "", line).strip()) for line in lines if line.strip()]


def on(python: str, **system: str) -> dict[str, str]:
    """The environment that markers are compared with."""
    return {"python_version": python, "python_full_version": f"{python}.9", **system}


def versions(path: Path, python: str = "", **system: str) -> dict[str, list[str]]:
    """Name → the versions that a file asks of a Python, of the one that runs unless another is given; one each."""
    environment = on(python or f"{sys.version_info[0]}.{sys.version_info[1]}", **system)
    found: dict[str, list[str]] = {}
    for each in requirements(path):
        if each.marker is None or each.marker.evaluate(environment):
            found.setdefault(canonicalize_name(each.name), []).append(str(each.specifier).removeprefix("=="))
    return found


def skip_unless_installed(name: str, version: str) -> None:
    """Skip what is true of one version of a library, such as a table made from it, where there is another."""
    installed = importlib.metadata.version(name)
    if installed == version:
        return
    if versions(CONSTRAINTS)[name] != [version]:
        pytest.skip(f"Python {sys.version_info[0]}.{sys.version_info[1]} has no {name} {version}")
    pytest.skip(f"{name} {installed} is installed, this needs {version}")


def skip_without_class(name: str) -> None:
    """Skip a model that an older Python's transformers does not have yet; the newest Python's must have it."""
    import transformers

    if not hasattr(transformers, name):
        (newest,) = versions(CONSTRAINTS, PYTHONS[-1])["transformers"]
        skip_unless_installed("transformers", newest)
