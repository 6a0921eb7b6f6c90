"""Adapters as nine versions of PEFT saved them: none of them is at fault, and each loads where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraformat.diagnostics import Severity
from loraformat.jobs.validate import validate

SAVED = sorted(path for path in (Path(__file__).parent.parent / "fixtures" / "saved").glob("*/*") if path.is_dir())


def test_there_are_adapters_of_many_versions() -> None:
    assert len({folder.parent.name for folder in SAVED}) >= 9


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_is_accepted_and_loads_in_its_own_version(folder: Path) -> None:
    report = validate(str(folder), deep=True, target=[f"peft=={folder.parent.name}"])
    assert {finding.code for finding in report.findings if finding.severity > Severity.INFO} <= {"LF105"}
    assert report.format == "peft"


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_older_versions_refuse_the_settings_that_came_later(folder: Path) -> None:
    """PEFT before 0.14 raises for any setting that it does not know; versions up to 0.13 wrote none that 0.13 lacks."""
    minor = int(folder.parent.name.split(".")[1])
    codes = {finding.code for finding in validate(str(folder), target=["peft==0.13"]).findings}
    assert ("LF615" in codes) == (minor > 13)
