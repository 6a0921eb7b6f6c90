"""Tokenizers are data: whatever is in them, reading them ends, and says what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.model.bundle import RawFile
from loraformat.rules.metadata.vocabulary import Vocabulary, read_vocabulary

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "vocab", "added_tokens", "id", "content", "word_to_idx", "merges", "normalizer", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def read(content: object) -> Vocabulary:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_vocabulary(RawFile("tokenizer.json", len(data), lambda: data))


def word_level(vocab: object, **more: object) -> dict[str, object]:
    return {"model": {"type": "WordLevel", "vocab": vocab}, **more}


def test_rows_are_the_greatest_number_and_one() -> None:
    assert read({"word_to_idx": {"<PAD>": 0, "katze": 1}, "vocab_size": 2}) == Vocabulary(2)
    assert read(word_level({"a": 0, "b": 7})) == Vocabulary(8)
    added = [{"content": "<x>", "id": 2}, {"content": "a", "id": 0}]
    assert read(word_level({"a": 0, "b": 1}, added_tokens=added)) == Vocabulary(3)
    assert read({"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}) == Vocabulary(2)


def test_a_huge_number_costs_nothing() -> None:
    assert read(word_level({"a": 2**31 - 1})).rows == 2**31
    assert read(word_level({"a": 10**30})).rows is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "expected an object"),
        ({}, "model: expected an object"),
        (word_level(3), "model.vocab: expected"),
        (word_level({"a": "0"}), 'model.vocab["a"]: expected a token number'),
        (word_level({"a": True}), 'model.vocab["a"]: expected a token number'),
        (word_level({"a": -1}), 'model.vocab["a"]: expected a token number'),
        (word_level({"a": 0, "b": 0}), '"a" and "b" share the number 0'),
        (word_level({"a": 0}, added_tokens={}), "added_tokens: expected a list"),
        (
            word_level({"a": 0}, added_tokens=[{"content": "x", "id": 1}, {"content": "y", "id": 1}]),
            "share the number 1",
        ),
        (
            word_level({"a": 0}, added_tokens=[{"content": "x", "id": 1}, {"content": "x", "id": 2}]),
            "appears twice",
        ),
        ({"model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}, 'needs "ab"'),
        ({"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}, 'needs "ab"'),
        ({"model": {"vocab": {"a": 0}, "merges": [3]}}, "expected two tokens"),
        (
            word_level({"a": 0}, normalizer={"normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]}),
            "damaged",
        ),
        ({"word_to_idx": []}, "word_to_idx: expected an object"),
        ({"word_to_idx": {"a": 0}, "vocab_size": 5}, "vocab_size: expected 1"),
    ],
)
def test_what_is_wrong_is_said(content: object, fault: str) -> None:
    (found, *_) = read(content).faults
    assert fault in found


def test_deep_nesting_is_a_fault() -> None:
    nested: object = "x"
    for _ in range(300):
        nested = {"normalizers": [nested]}
    assert read(word_level({"a": 0}, normalizer=nested)).faults


@given(JSON)
def test_reading_never_raises(content: object) -> None:
    read(content)
