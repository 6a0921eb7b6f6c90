"""What is shown to a terminal is safe, whatever it was."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat import validate
from loraformat.diagnostics import NOWHERE, FindingLocation, Severity, counted, counted_of, in_file, in_weights, show

BAD = Path(__file__).parent.parent / "fixtures" / "bad"

ANY_TEXT = st.text(st.characters(), max_size=500) | st.text("\x1b[]\x9b\u202e\u2066\u200b\r\n\x07\ud800a", max_size=50)


@given(ANY_TEXT)
def test_nothing_that_a_terminal_would_act_on_gets_through(text: str) -> None:
    shown = show(text)
    # Cf and Zl, Zp: marks that reorder, hide or break text. Soft joiners of Arabic script may pass.
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)
    assert not set(shown) & set("\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u061c")


@given(ANY_TEXT)
def test_safe_text_stays_as_it_is(text: str) -> None:
    shown = show(text, limit=100_000)
    assert show(shown, limit=100_000) == shown


def test_long_text_is_cut_and_says_so() -> None:
    assert show("x" * 500, limit=10) == "x" * 10 + "… (490 more characters)"


def test_severities_have_an_order() -> None:
    assert max(Severity.WARNING, Severity.ERROR, Severity.INFO) is Severity.ERROR
    assert sorted(Severity) == [Severity.INFO, Severity.WARNING, Severity.ERROR]


@pytest.mark.parametrize(
    ("count", "verb", "said"),
    [(0, "is", "0 weights are"), (1, "is", "1 weight is"), (2, "was", "2 weights were"), (1, "", "1 weight")],
)
def test_a_count_agrees_with_its_noun_and_verb(count: int, verb: str, said: str) -> None:
    assert counted(count, "weight", verb) == said


def test_a_part_of_a_number_agrees_with_its_verb() -> None:
    assert counted_of(1, 2, "row") == "1 of 2 rows is"
    assert counted_of(2, 2, "row", "has") == "2 of 2 rows have"
    assert counted_of(1, 1, "row") == "1 of 1 row is"


@pytest.mark.parametrize("case", sorted(BAD.iterdir()), ids=lambda case: case.name)
def test_no_message_counts_one_thing_in_the_plural(case: Path) -> None:
    """None of the bad examples provokes a "1 weights are"."""
    expect = json.loads((case / "expect.json").read_text(encoding="utf-8"))
    target = expect.get("target", [])
    base = next((str(path) for path in case.iterdir() if path.name.startswith("base")), None)
    targets = [target] if isinstance(target, str) else target
    report = validate(case / "adapter", base=base, deep=True, target=targets, format=expect.get("format"))
    assert not [
        each.message for each in report.findings if re.search(r"\b1 [a-z]+s (are|were|have|do)\b", each.message)
    ]


@pytest.mark.parametrize(
    ("location", "text", "pointer"),
    [
        (NOWHERE, "", ""),
        (FindingLocation(subject="--target"), "--target", ""),
        (in_file("a.json"), "a.json", ""),
        (in_file("a.json", "r"), "a.json: r", "/r"),
        (in_file("a.json", "rank_pattern", "q/~1"), 'a.json: rank_pattern["q/~1"]', "/rank_pattern/q~1~01"),
        (in_file("a.json", "groups", 0, "b").at(2), 'a.json: groups[0]["b"][2]', "/groups/0/b/2"),
        (in_file("a.json", "<eos>"), 'a.json: "<eos>"', "/<eos>"),
        (in_weights("m.q"), "m.q", ""),
        (in_weights("m.q", file="a.bin", more=3), "a.bin: m.q and 3 more", ""),
        (FindingLocation(file="run.py", more=1), "run.py and 1 more", ""),
        (FindingLocation(subject="hf://a/b", tensor="m.q"), "hf://a/b: m.q", ""),
    ],
)
def test_a_location_is_printed_from_its_parts(location: FindingLocation, text: str, pointer: str) -> None:
    assert (str(location), location.pointer) == (text, pointer)
