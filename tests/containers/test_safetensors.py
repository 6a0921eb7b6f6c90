"""The safetensors reader and layout: a test for each rule, and the safetensors library as the second opinion."""

import json
import struct
from pathlib import Path

import pytest
import torch
from containers.torch_files import raw_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from loraformat.containers import plan_file
from loraformat.containers.safetensors import Header, lazy_tensors, read_header
from loraformat.errors import (
    ContainerError,
    GitLfsPointer,
    InvalidHeader,
    LoraFormatError,
    NotATensorFile,
    StorageError,
    TruncatedFile,
    WebPage,
)
from loraformat.model.tensors import DType, Span
from loraformat.storage import MemoryStore

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def with_header(fields: object, data: bytes = bytes(8)) -> bytes:
    return raw(json.dumps(fields).encode(), data)


def opened(data: bytes) -> Header:
    return read_header(MemoryStore({"m.safetensors": data}), "m.safetensors")


def entry(**changes: object) -> dict[str, object]:
    return {"a": {**F32, **changes}}


FAULTS: dict[str, tuple[bytes, type[ContainerError], str]] = {
    "empty": (b"", TruncatedFile, "0 bytes"),
    "shorter than the length": (b"\x10\0\0", TruncatedFile, "3 bytes"),
    "header cut short": (
        struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"',
        TruncatedFile,
        "ends at byte 48, the file at byte 27",
    ),
    "header of 1 byte": (raw(b"{") + bytes(8), InvalidHeader, "a header of 1 bytes"),
    "header of 0 bytes": (bytes(16), InvalidHeader, "a header of 0 bytes"),
    "header beyond the limit": (struct.pack("<Q", 100_000_001) + b"{}", InvalidHeader, "at most 100000000"),
    "header of 2**63 bytes": (struct.pack("<Q", 1 << 63) + b"\xff", InvalidHeader, "9223372036854775808"),
    "array": (raw(b"[]"), InvalidHeader, "expected an opening brace"),
    "leading space": (raw(b" {}"), InvalidHeader, "expected an opening brace"),
    "leading BOM": (raw(b"\xef\xbb\xbf{}"), InvalidHeader, "expected an opening brace"),
    "padding of NULs": (raw(b"{}\0\0"), InvalidHeader, "closing brace and spaces"),
    "padding of newlines": (raw(b"{}\n\n"), InvalidHeader, "closing brace and spaces"),
    "two values": (raw(b"{}{}"), InvalidHeader, "not valid JSON"),
    "syntax": (raw(b'{"a"}'), InvalidHeader, "not valid JSON: line 1, column 5"),
    "not UTF-8": (raw(b'{"\xff":1}'), InvalidHeader, "not UTF-8"),
    "repeated name": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), InvalidHeader, "twice"),
    "lone surrogate": (raw(b'{"\\ud800":1}'), InvalidHeader, "lone surrogate"),
    "metadata list": (with_header({"__metadata__": []}, b""), InvalidHeader, "expected an object, found a list"),
    "metadata number": (with_header({"__metadata__": {"x": 1}}, b""), InvalidHeader, '"x": expected a string'),
    "entry is a list": (with_header({"a": []}), InvalidHeader, "a: expected an object, found a list"),
    "no dtype": (with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}), InvalidHeader, "a: dtype is missing"),
    "no shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), InvalidHeader, "shape is missing"),
    "no offsets": (with_header({"a": {"dtype": "F32", "shape": [2]}}), InvalidHeader, "data_offsets is missing"),
    "unknown field": (with_header(entry(extra=1)), InvalidHeader, 'unknown field "extra"'),
    "unknown dtype": (with_header(entry(dtype="F33")), InvalidHeader, 'unknown dtype "F33"'),
    "dtype in lower case": (with_header(entry(dtype="f32")), InvalidHeader, "unknown dtype"),
    "dtype list": (with_header(entry(dtype=["F32"])), InvalidHeader, "unknown dtype"),
    "float in the shape": (with_header(entry(shape=[2.0])), InvalidHeader, "list of integers"),
    "boolean in the shape": (with_header(entry(shape=[2, True])), InvalidHeader, "list of integers"),
    "negative size": (with_header(entry(shape=[-2])), InvalidHeader, "list of integers"),
    "size beyond 53 bits": (with_header(entry(shape=[1 << 53, 0])), InvalidHeader, "list of integers"),
    "shape is no list": (with_header(entry(shape=2)), InvalidHeader, "list of integers"),
    "nine dimensions": (with_header(entry(shape=[1] * 8 + [2])), InvalidHeader, "9 dimensions"),
    "empty but huge": (with_header(entry(shape=[1 << 50, 1 << 50, 0], data_offsets=[0, 0])), InvalidHeader, "63 bits"),
    "wrong product": (with_header(entry(shape=[3])), InvalidHeader, r"F32 \[3\] takes 12 bytes, data_offsets span 8"),
    "one offset": (with_header(entry(data_offsets=[0])), InvalidHeader, "expected two integers"),
    "three offsets": (with_header(entry(data_offsets=[0, 8, 8])), InvalidHeader, "expected two integers"),
    "float offset": (with_header(entry(data_offsets=[0, 8.0])), InvalidHeader, "expected two integers"),
    "offsets reversed": (with_header(entry(data_offsets=[8, 0])), InvalidHeader, "end 0 is before begin 8"),
    "starts late": (
        with_header(entry(data_offsets=[4, 12]), bytes(12)),
        InvalidHeader,
        "4 bytes are unused between the header",
    ),
    "hole": (
        with_header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
        InvalidHeader,
        "4 bytes are unused between a and b",
    ),
    "overlap": (
        with_header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        InvalidHeader,
        "a and b overlap by 4 bytes",
    ),
    "same bytes twice": (with_header({"a": F32, "b": F32}), InvalidHeader, "a and b overlap by 8 bytes"),
    "data cut short": (
        with_header({"a": F32}, bytes(7)),
        TruncatedFile,
        "the file has .* bytes, but by its header it should have.*fetch the file again",
    ),
    "trailing bytes": (with_header({"a": F32}, bytes(9)), InvalidHeader, "1 byte is left after the last tensor"),
    "trailing zip": (with_header({"a": F32}, bytes(8) + b"PK\x05\x06"), InvalidHeader, "4 bytes are left"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", GitLfsPointer, "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html>", WebPage, "an HTML or XML page.*download it again"),
    "JSON": (b'{"error":"Repository not found"}', NotATensorFile, "a JSON document"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + bytes(99), NotATensorFile, "a zip archive"),
    "pickle": (b"\x80\x02}q\0." + bytes(9), NotATensorFile, "a bare pickle; it was not executed"),
    "legacy torch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", NotATensorFile, "torch before 1.6"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(20), NotATensorFile, "a GGUF file"),
    "tar": (b"x" * 257 + b"ustar\0" + bytes(300), NotATensorFile, "a tar archive"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), NotATensorFile, "a gzip stream"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), NotATensorFile, "a 7z archive"),
    "text": (b"please see our new repository\n", NotATensorFile, "a plain text"),
}
# What the library reads although the format's page forbids it, or although no program writes it.
STRICTER = {
    "leading space",
    "padding of newlines",
    "repeated name",
    "unknown field",
    "nine dimensions",
    "empty but huge",
    "size beyond 53 bits",
}


def library_accepts(data: bytes, folder: Path) -> bool:
    (folder / "x.safetensors").write_bytes(data)
    try:
        with safe_open(folder / "x.safetensors", "pt") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_named(fault: str, tmp_path: Path) -> None:
    data, kind, message = FAULTS[fault]
    with pytest.raises(ContainerError, match=message) as caught:
        opened(data)
    assert type(caught.value) is kind
    assert caught.value.where == "m.safetensors"
    assert not library_accepts(data, tmp_path) or fault in STRICTER


def test_an_absent_file() -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_header(MemoryStore(), "absent")


ACCEPTED = {
    "no tensors": raw(b"{}"),
    "spaces after": raw(b"{}" + b" " * 30),
    "only metadata": with_header({"__metadata__": {"format": "pt"}}, b""),
    "metadata null, as MLX writes it": with_header({"__metadata__": None, "a": F32}),
    "misaligned": with_header(
        {"b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "a": {**F32, "data_offsets": [3, 11]}}, bytes(11)
    ),
    "empty name": with_header({"": F32}),
    "escapes": raw(b'{"a\\u001b\\ud83d\\ude00":' + json.dumps(F32).encode() + b"}", bytes(8)),
    "scalar": with_header({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}),
    "order of the header is not that of the data": with_header(
        {"b": {**F32, "data_offsets": [8, 16]}, "a": F32}, bytes(16)
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_library_reads_is_read(name: str, tmp_path: Path) -> None:
    assert library_accepts(ACCEPTED[name], tmp_path)
    found = opened(ACCEPTED[name])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(found.entries) == set(file.keys())
        assert found.metadata == (file.metadata() or {})


def test_entries_stand_in_the_order_of_their_bytes() -> None:
    data = with_header(
        {"b": {**F32, "data_offsets": [8, 16]}, "a": F32, "e": {**F32, "shape": [0], "data_offsets": [0, 0]}}, bytes(16)
    )
    found = opened(data)
    assert list(found.entries) == ["e", "a", "b"]
    assert found.entries["b"].span == Span(found.data_start + 8, 8)
    assert found.nbytes == len(data)


# `safetensors.torch.load` 0.8.0 raises KeyError for F8_E8M0, which `load_file` reads.
DTYPES = sorted(set(DType) - {DType.F8_E8M0}, key=lambda dtype: dtype.safetensors)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


def random_tensor(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is DType.BOOL:
        return torch.randint(0, 2, shape).bool()
    count = int(torch.Size(shape).numel())
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype.torch).reshape(shape)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    specs = draw(st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
    return {name: random_tensor(dtype, shape) for name, (dtype, shape) in specs.items()}


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert raw_bytes(one) == raw_bytes(other)


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    shapes = {name: (dtype_of(value), tuple(value.shape)) for name, value in tensors.items()}
    layout = plan_file("safetensors", shapes, metadata=metadata)
    data = bytearray(layout.nbytes)
    for offset, part in layout.frame({}):
        data[offset : offset + len(part)] = part
    for name, value in tensors.items():
        span = layout.entries[name].span
        data[span.offset : span.end] = raw_bytes(value)
    return bytes(data)


def dtype_of(value: torch.Tensor) -> DType:
    found = DType.by_torch_name(str(value.dtype).removeprefix("torch."))
    assert found is not None
    return found


@given(tensor_dicts(), st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=9), max_size=3))
def test_the_library_reads_what_we_write(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    data = written(tensors, metadata)
    found = load(data)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert_same(found[name], value)
    assert opened(data).metadata == metadata


@given(tensor_dicts())
def test_we_read_what_the_library_writes(tensors: dict[str, torch.Tensor]) -> None:
    store = MemoryStore({"m.safetensors": save(tensors)})
    lazies = lazy_tensors(store, "m.safetensors", read_header(store, "m.safetensors"))
    assert set(lazies) == set(tensors)
    for name, value in tensors.items():
        assert_same(lazies[name].torch(), value)


def test_every_tensor_is_aligned_and_bytes_do_not_depend_on_the_order() -> None:
    tensors = {f"t{number}": random_tensor(dtype, (3,)) for number, dtype in enumerate(DTYPES)}
    data = written(tensors, {"b": "1", "a": "2"})
    assert data == written(dict(reversed(tensors.items())), {"a": "2", "b": "1"})
    assert all(entry.span.offset % entry.dtype.itemsize == 0 for entry in opened(data).entries.values())
    assert opened(data).data_start % 8 == 0


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(data: st.DataObject) -> None:
    good = written({"a.x": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"k": "v"})
    header_end = opened(good).data_start
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        position = data.draw(st.integers(0, header_end - 1))
        changed = good[position] ^ data.draw(st.integers(1, 255))
        bad = good[:position] + bytes([changed]) + good[position + 1 :]
    try:
        found = opened(bad)
    except LoraFormatError:
        return
    again = load(bad)
    assert {name: tuple(entry.shape) for name, entry in found.entries.items()} == {
        name: tuple(value.shape) for name, value in again.items()
    }


def test_a_bool_that_is_neither_true_nor_false_is_refused() -> None:
    store = MemoryStore({"m": with_header({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2")})
    lazy = lazy_tensors(store, "m", read_header(store, "m"))["a"]
    assert lazy.raw is not None
    for read in (lazy.read, lazy.raw):
        with pytest.raises(ContainerError, match="neither 0 nor 1"):
            read(0, 2)


def test_a_reserved_name_is_refused() -> None:
    with pytest.raises(ContainerError, match="__metadata__"):
        plan_file("safetensors", {"__metadata__": (DType.F32, (1,))})


def test_a_header_of_50_000_tensors_is_read() -> None:
    """Quadratic work would run into the time limit of the suite."""
    count = 50_000
    shapes = {f"layers.{number}.weight": (DType.F32, (1,)) for number in range(count)}
    layout = plan_file("safetensors", shapes)
    store = MemoryStore({"m": layout.frame({})[0][1] + bytes(4 * count)})
    assert len(read_header(store, "m").entries) == count
