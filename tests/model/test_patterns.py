"""Regular expressions of configs: the same answers as `re`, and no pattern that takes long."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.model.patterns import fullmatch, is_linear

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "q_proj", "blocks.3.attn.qkv", "")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.(\d+)\.self_attn\.(?:q|k|v)_proj",
        r"(.*\.)?(q_proj)$",
        r"^model.*up_proj$",
        r"blocks\.[0-9]+\.attn\.[^x]+",
        r"model.layers.1{2}.mlp.\w+",
        r"(?P<stem>.+?)\.q_proj",
        r"[\w.]*",
        r"q_proj|blocks.*",
        r"[]a-]*",
        r"a{0,3}",
        r"",
    ],
)
def test_it_agrees_with_re(pattern: str) -> None:
    assert is_linear(pattern)
    assert [fullmatch(pattern, text) for text in MODULES] == [bool(re.fullmatch(pattern, text)) for text in MODULES]


@pytest.mark.parametrize(
    "pattern",
    [r"(?!x).*", r"(a)\1", r"(?i)q", r"a++", r"a**", r"*a", r"(a", r"a)", r"[a", r"\bq", "a\\", r"x{3,2}", "(" * 99],
)
def test_what_is_outside_the_subset_is_not_evaluated(pattern: str) -> None:
    assert not is_linear(pattern)
    assert fullmatch(pattern, "a") is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"(a+)+$", True),
        (r"(a|a)*b", False),
        (r"(a*)*b", False),
        (r"(.*.*.*.*.*.*)x", False),
        (r"(a?){200}a{200}", True),
    ],
)
def test_patterns_that_make_re_hang_come_to_an_end(pattern: str, expected: bool) -> None:
    """What hangs runs into the time limit of the suite."""
    assert fullmatch(pattern, "a" * 200) is expected


@given(st.text("ab.|*+?()[]^$\\d{}1,-", max_size=12), st.text("ab1.", max_size=6))
def test_random_patterns_agree_with_re(pattern: str, text: str) -> None:
    """What we evaluate, `re` evaluates to the same."""
    found = fullmatch(pattern, text)
    if found is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("pattern", ["{2,3}a", "({2}a)", "a|{,3}", "{,}"])
def test_a_quantifier_with_nothing_to_repeat_is_no_literal(pattern: str) -> None:
    """Python refuses such a pattern, and so does PEFT, which hands it to Python."""
    with pytest.raises(re.error):
        re.compile(pattern)
    assert not is_linear(pattern)


@pytest.mark.parametrize("pattern", ["{}", "{a}", "a{", "{1", "{1,2,3}"])
def test_braces_that_are_no_quantifier_are_literals(pattern: str) -> None:
    assert fullmatch(pattern, pattern) is (re.fullmatch(pattern, pattern) is not None) is True
