"""strict_json: what is refused, and that everything else is what the standard library reads."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import InvalidJson
from loraformat.strict_json import dump, parse

FAULTS = {
    "empty": (b"", "line 1, column 1"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "(?s)byte-order mark.*without a byte-order mark"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16"),
    "not UTF-8": (b'{\n "a": "\xff"}', "line 2, column 8: not UTF-8"),
    "syntax": (b'{\n "a": }', "line 2, column 7"),
    "comment": (b"// x\n{}", "line 1, column 1"),
    "trailing comma": (b"[1,]", "line 1"),
    "two values": (b"{} {}", "extra data"),
    "repeated key": (b'{"a": {"b": 1, "b": 1}}', '"b" appears twice'),
    "repeated key by escape": (b'{"a": 1, "\\u0061": 2}', '"a" appears twice'),
    "NaN": (b"[NaN]", "NaN is not JSON"),
    "infinity": (b"[-Infinity]", "-Infinity is not JSON"),
    "overflow": (b"[1e999]", "beyond the range"),
    "long integer": (b"[" + b"1" * 21 + b"]", "an integer of 21 digits"),
    "very long integer": (b"[-" + b"1" * 5000 + b"]", "an integer of 5000 digits"),
    "65 lists": (b"[" * 65 + b"]" * 65, "line 1, column 65: nested deeper than 64"),
    "65 objects": (b'{"a":\n' * 65 + b"1" + b"}" * 65, "line 65, column 1: nested deeper"),
    "100000 lists": (b"[" * 100_000, "nested deeper than 64"),
    "lone surrogate": (b'["\\ud800"]', "a lone surrogate"),
    "lone surrogate in a key": (b'{"x\\uDC00": 1}', "a lone surrogate"),
    "control character": (b'["\x1b"]', "line 1"),
    "unterminated": (b'["\\"\\"', "line 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_its_place(fault: str) -> None:
    data, message = FAULTS[fault]
    with pytest.raises(InvalidJson, match=message) as caught:
        parse(data, "config.json")
    assert caught.value.where == "config.json"


def test_size_is_limited() -> None:
    assert parse(b"[" + b" " * 98 + b"]", "x", limit=100) == []
    with pytest.raises(InvalidJson, match="101 bytes, at most 100"):
        parse(b"[" + b" " * 99 + b"]", "x", limit=100)


def test_the_number_of_lists_is_limited() -> None:
    with pytest.raises(InvalidJson, match="more than 4000000 lists"):
        parse(b"[" + b"[]," * 4_000_001 + b"[]]", "x", limit=1 << 30)


def test_limits_themselves_are_allowed() -> None:
    assert parse(b"[" * 64 + b"]" * 64, "x") is not None
    assert parse(b"[" + b"9" * 20 + b"]", "x") == [10**20 - 1]


def test_brackets_in_strings_are_not_levels() -> None:
    text = "[{" * 100 + '\\"' + "]" * 7
    assert parse(json.dumps({"a": text}).encode(), "x") == {"a": text}


def test_surrogate_pairs_are_characters() -> None:
    assert parse(b'["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_dumped_is_parsed(value: object) -> None:
    data = dump(value)  # type: ignore[arg-type]
    assert data.isascii()
    assert data.endswith(b"\n")
    assert parse(data, "x") == value
    assert parse(json.dumps(value, ensure_ascii=False).encode(), "x") == value


@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_bytes_are_a_value_or_invalid_json(data: bytes) -> None:
    try:
        value = parse(data, "x")
    except InvalidJson:
        return
    assert value == json.loads(data)


def test_dump_is_deterministic() -> None:
    assert dump({"b": [1, "é"], "a": {}}) == b'{\n  "a": {},\n  "b": [\n    1,\n    "\\u00e9"\n  ]\n}\n'


def test_escapes_take_no_more_memory_than_what_stands_for_itself() -> None:
    """Two million of them; a regular expression took some hundred bytes for each."""

    def peak(text: bytes) -> int:
        data = b'{"a": "' + text + b'"}'
        tracemalloc.start()
        parse(data, "x", limit=1 << 30)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(b"\\n" * 2_000_000) < 2 * peak(b"nn" * 2_000_000)


@given(st.lists(st.sampled_from(["[", "]", "{", "}", '"', "\\", "\\\\", '\\"', "a"]), max_size=12).map("".join))
def test_brackets_after_escapes_in_strings_are_counted_as_json_has_it(inside: str) -> None:
    """Seventy levels with such a string in front are too deep, and sixty are not, whatever the string holds."""
    string = json.dumps(inside)
    assert parse(f"[{string}, {'[' * 60}{']' * 60}]".encode(), "x")
    with pytest.raises(InvalidJson, match="deeper"):
        parse(f"[{string}, {'[' * 70}{']' * 70}]".encode(), "x")
