"""Every rule has a page and a fixture that trips it, and trips nothing else."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from loraformat.jobs.validate import validate
from loraformat.rules import RULES, Rule

BAD = Path(__file__).parent.parent / "fixtures" / "bad"
HEADINGS = ["## Why it matters", "## Example", "## What to do", "## Source"]


def folders() -> list[Path]:
    return sorted(path.parent for path in BAD.glob("*/expect.json"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_it_has_a_page(rule: Rule) -> None:
    page = inspect.getdoc(rule.check) or ""
    assert [line for line in page.splitlines() if line.startswith("## ")] == HEADINGS
    assert page.splitlines()[0].endswith(".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_it_has_a_fixture(rule: Rule) -> None:
    assert (BAD / f"{rule.code}-{rule.name}" / "expect.json").is_file()


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_the_fixture_gives_these_codes_and_no_others(folder: Path) -> None:
    base = folder / "base"
    expected = json.loads((folder / "expect.json").read_text())
    target = [expected["target"]] if "target" in expected else []
    model = str(base) if base.is_dir() else None
    report = validate(str(folder / "adapter"), base=model, deep=True, target=target, format=expected.get("format"))
    assert sorted({finding.code for finding in report.findings}) == expected["codes"], report.findings
