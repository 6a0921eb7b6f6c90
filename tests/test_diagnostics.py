"""What is shown to a terminal is safe, whatever it was."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from loraformat.diagnostics import Severity, show

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
