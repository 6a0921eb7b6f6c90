"""LF406 foretells what a merge then measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loraformat.jobs.merge import merge
from loraformat.jobs.validate import validate

CASE = Path(__file__).parent.parent.parent / "fixtures" / "bad" / "LF406-lost-to-rounding"


def test_the_share_that_is_foretold_is_the_share_that_is_kept(tmp_path: Path) -> None:
    """The weights have fewer rows than are sampled, so the two are the same sum."""
    (finding,) = validate(str(CASE / "adapter"), base=str(CASE / "base"), deep=True).findings
    found = re.match(r"([\d.]+)% of the update", finding.message)
    assert found is not None
    merged = merge(str(CASE / "base"), [str(CASE / "adapter")], str(tmp_path / "out"))
    assert merged.data.retained * 100 == pytest.approx(float(found[1]), abs=0.05)
