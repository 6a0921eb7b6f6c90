"""The quick reader of safetensors headers against the strict one: the same answers, or none."""

import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraformat.containers import strict_json
from loraformat.containers.plain_header import read_plain
from loraformat.containers.safetensors import read_header
from loraformat.errors import ContainerError, InvalidJson
from loraformat.storage import MemoryStore

DATA = bytes(64)
NAMES = st.sampled_from(["a", "b.c", "model.layers.0.lora_A.weight", "", "é", 'q"', "back\\slash", "[{", "a b", "}}"])
FORMS = st.sampled_from(
    [
        *[("F32", [2], 8), ("U8", [0], 0), ("BF16", [2, 3], 12), ("I8", [], 1), ("F33", [1], 4), ("F32", [3], 8)],
        *[("F32", [1] * 8 + [2], 8), ("F32", [1 << 50, 1 << 50, 0], 0), ("F64", [1 << 54, 0], 0), ("f32", [2], 8)],
    ]
)
GOOD = '{"__metadata__":{"format":"pt"},"a.lora_A.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """Entries one after another, now and then with a gap, an overlap, or a fault of their own."""
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        fields["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=3))
    position = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype, shape, nbytes = draw(FORMS)
        begin = position + draw(st.sampled_from([0, 0, 0, 0, 4, -1]))
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}
        position += nbytes
    return fields


def outcome(header: str, nbytes: int) -> object:
    """What the reader says of a file with this header and so many bytes of data."""
    data = struct.pack("<Q", len(header)) + header.encode("ascii") + DATA[:nbytes]
    try:
        found = read_header(MemoryStore({"m": data}), "m")
    except ContainerError as error:
        return type(error), error.message
    return list(found.entries.items()), found.metadata, found.data_start


def ends(fields: dict[str, Any]) -> int:
    """The last byte that an entry claims, where that is few."""
    offsets = [value["data_offsets"][1] for value in fields.values() if isinstance(value, dict) and "dtype" in value]
    return max([0, *offsets])


@settings(max_examples=500)
@given(headers(), st.sampled_from([0, 0, 0, 1, -1]))
def test_spaces_in_a_header_change_nothing(fields: dict[str, Any], extra: int) -> None:
    """With spaces between its parts a header goes to the strict reader."""
    spaced, compact = json.dumps(fields), json.dumps(fields, separators=(",", ":"))
    nbytes = max(0, ends(fields) + extra)
    assume(nbytes <= len(DATA))
    assert outcome(compact.ljust(len(spaced)), nbytes) == outcome(spaced, nbytes)


@settings(max_examples=1000)
@given(st.integers(0, len(GOOD)), st.integers(0, 3), st.text('{}[]",:\\ 019-+.eatF\n\0é', max_size=3), st.booleans())
def test_what_is_read_quickly_is_strict_json_and_says_the_same(at: int, drop: int, put: str, twice: bool) -> None:
    text = GOOD[:at] + put + GOOD[at + drop :]
    header = (text[:-1] + "," + text[1:] if twice else text).encode()
    plain = read_plain(header)
    if plain is None:
        return
    value = strict_json.parse(header, "m")
    assert isinstance(value, dict)
    assert value.pop("__metadata__", {}) == plain.metadata
    assert value == {
        name: {"dtype": dtype, "shape": json.loads(f"[{sizes}]"), "data_offsets": [int(begin), int(end)]}
        for name, dtype, sizes, begin, end in plain.entries
    }


def test_the_library_s_own_spelling_is_read_quickly() -> None:
    plain = read_plain(GOOD.encode() + b"   ")
    assert plain == ({"format": "pt"}, [("a.lora_A.weight", "F32", "2,1", "0", "8")])
    assert read_plain(GOOD.encode()[:-1]) is None


def test_repeated_names_are_left_to_the_strict_reader() -> None:
    entry = GOOD[GOOD.index('"a.') : -1]
    for header in (f"{{{entry},{entry}}}", '{"__metadata__":{"a":"1","a":"2"},' + entry + "}"):
        assert read_plain(header.encode()) is None
        with pytest.raises(InvalidJson, match="twice"):
            strict_json.parse(header.encode(), "m")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{' + b'"":"",' * 200_000 + b'"":""},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=["sizes", "pairs"],
)
def test_what_repeats_without_end_takes_no_memory_for_each_turn(header: bytes) -> None:
    tracemalloc.start()
    try:
        assert read_plain(header) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(header)  # its text, and the turns until it is given up
