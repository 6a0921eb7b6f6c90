"""Notes and losses: codes, pages, and the text of one occurrence."""

from __future__ import annotations

import re

import pytest

from loraformat.diagnostics import Severity
from loraformat.formats.kit import findings
from loraformat.formats.kit.findings import FINDINGS, Kind
from loraformat.rules import RULES

HEADINGS = ["## Why it matters", "## Example", "## What to do", "## Source"]


@pytest.mark.parametrize("kind", FINDINGS, ids=lambda kind: kind.code)
def test_every_kind_has_a_page(kind: Kind[...]) -> None:
    summary, *_ = kind.page.splitlines()
    assert summary.endswith(".")
    assert re.findall(r"^## .*", kind.page, re.MULTILINE) == HEADINGS


def test_the_list_is_complete_and_codes_are_unique() -> None:
    every = [value for value in vars(findings).values() if isinstance(value, Kind)]
    assert sorted(each.code for each in every) == [each.code for each in FINDINGS]
    codes = [each.code for each in (*FINDINGS, *RULES)]
    assert len(set(codes)) == len(codes)


def test_an_occurrence_carries_code_and_name() -> None:
    found = findings.unpaired_factor("m.q", "lora_A", "lora_B")
    assert (found.code, found.name, found.severity) == ("LF201", "unpaired-factor", Severity.ERROR)
    assert (found.where, found.message) == ("m.q", "lora_A is present, but lora_B is missing")
    assert found.hint


def test_long_lists_are_cut() -> None:
    assert findings.listed(["a"]) == "a"
    assert findings.listed(list("abcdefg")) == "a, b, c and 4 more"
