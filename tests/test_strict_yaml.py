"""YAML as settings have it, with PyYAML's own safe loader as second opinion, and what is refused."""

from __future__ import annotations

import pytest
import yaml as upstream
from hypothesis import given
from hypothesis import strategies as st

from loraformat import strict_yaml
from loraformat.errors import InvalidYaml

PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text("abc", min_size=1, max_size=3)
VALUES = st.recursive(
    PLAIN | st.text("abc: -#'\"\n", max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_a_dump_says_comes_back(value: dict[str, object]) -> None:
    text = upstream.safe_dump(value)
    if "&" not in text:
        assert strict_yaml.parse(text.encode(), "x.yaml") == upstream.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x 1\nb: *x\n",
        "a: !!python/object/apply:os.system [true]\n",
        "a: !x 1\n",
        "a: 1\na: 2\n",
        "? [1, 2]\n: 3\n",
        "a: [1\n",
        "a: .nan\n",
        "a: .inf\n",
        "[" * 70 + "]" * 70,
        "- 1\n" * 100_001,
        "a: 1\n---\nb: 2\n",
        "a: \x00\n",
        # What follows made PyYAML compute for minutes, or raise what is no YAMLError.
        "a: 1" + ":1" * 400_000,
        "a: 1" + ":1" * 400_000 + ".5",
        "a: " + "1" * 5000,
        "%YAML 1." + "9" * 5000 + "\n---\na: 1\n",
        'a: "\\UFFFFFFFF"\n',
        'a: "\\ud800"\n',
        '"\\udfff": 1\n',
        "&" + "x" * 900_000 + " a: 1\n",
    ],
)
def test_anything_else_is_refused_at_once(text: str) -> None:
    with pytest.raises(InvalidYaml):
        strict_yaml.parse(text.encode(), "x.yaml")


def test_bytes_that_are_no_text_and_too_many_are_refused() -> None:
    with pytest.raises(InvalidYaml):
        strict_yaml.parse(b"a: \xff\xfe\xff\n", "x.yaml")
    with pytest.raises(InvalidYaml, match="at most"):
        strict_yaml.parse(b"#" * (1 << 20) + b"#", "x.yaml")
