"""Regular expressions of configs: the same answers as `re`, and no pattern that takes long."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.budget import Budget
from loraformat.model.patterns.keys import is_end_of
from loraformat.model.patterns.matching import Matcher, fullmatch, is_linear

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


def test_groups_that_hold_nothing_are_not_repeated_for_ever() -> None:
    """A thousand times a thousand times a thousand repetitions of nothing; what hangs runs into the time limit."""
    assert not is_linear("(((){999}){999}){999}")


def test_one_pattern_for_many_names_costs_what_their_differences_cost() -> None:
    budget = Budget()
    matcher = Matcher(r"(.?){990}q_proj", budget)
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(3000)]
    assert all(matcher.fullmatch(name) for name in names)
    assert Budget().left - budget.left < 1000 * len(names)


def test_beyond_its_budget_a_matcher_does_not_answer() -> None:
    matcher = Matcher("(a|b)*c", Budget(100))
    answers = [matcher.fullmatch("ab" * 20 + "c") for _ in range(10)]
    assert answers[-1] is None
    assert False not in answers


def test_the_steps_that_a_pattern_takes_do_not_depend_on_what_was_matched_before_it() -> None:
    """Programs are kept between runs; budgets must not notice."""

    def steps() -> int:
        budget = Budget()
        Matcher("x(a|b)+[c-f]{2,40}", budget).fullmatch("xabcdef")
        return Budget().left - budget.left

    assert steps() == steps() > 0


@given(st.text("abc-]^\\\\dw[", max_size=8), st.text("abc-]^1", min_size=1, max_size=1))
def test_classes_agree_with_re(inside: str, character: str) -> None:
    found = fullmatch(f"[{inside}]", character)
    if found is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == bool(re.fullmatch(f"[{inside}]", character))


@pytest.mark.parametrize("pattern", [r"[\d-[]", r"[\w-.]", r"[\d-a]", r"[a-\d]"])
def test_a_range_from_or_to_a_class_is_not_read(pattern: str) -> None:
    """Python's `re` refuses it."""
    with pytest.raises(re.error, match="bad character range"):
        re.compile(pattern)
    assert fullmatch(pattern, "1") is None


@pytest.mark.parametrize("pattern", ["a{0620,1}", "a{0000000620,0000000001}", "{a{0620,1}"])
def test_bounds_with_leading_zeros_are_bounds(pattern: str) -> None:
    """Python's `re` reads them as numbers, and refuses these."""
    with pytest.raises(re.error, match="min repeat"):
        re.compile(pattern)
    assert fullmatch(pattern, "a") is None


@pytest.mark.parametrize(
    ("end", "path", "expected"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("0.q_proj", "layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.0.q_proj", False),
        ("layers.0.q_proj", "q_proj", False),
        ("0.q_proj", "layers.10.q_proj", False),
    ],
)
def test_an_end_is_made_of_whole_names(end: str, path: str, expected: bool) -> None:
    assert is_end_of(end, path) is expected
