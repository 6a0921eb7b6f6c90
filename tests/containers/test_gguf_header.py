"""The GGUF reader and layout: a test for each rule, and the gguf package as the second opinion."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from containers.gguf_files import (
    ARRAY,
    BOOL,
    F16_TENSOR,
    F32,
    F32_TENSOR,
    Q8_0,
    STRING,
    U8,
    U32,
    U64,
    array,
    field,
    gguf,
    info,
    number,
    string,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.containers.bundles import open_tensors
from loraformat.containers.gguf.header import MOST_LISTED, Array, Header, read_header
from loraformat.containers.gguf.layout import Settings, encoded, plan_file
from loraformat.containers.gguf.layout import field as encoded_field
from loraformat.containers.gguf.types import BY_CODE, BY_NAME
from loraformat.errors import (
    ContainerError,
    GitLfsPointer,
    InvalidHeader,
    LoraFormatError,
    NotATensorFile,
    TruncatedFile,
    UnsupportedUpdate,
)
from loraformat.model.tensors import DType, Span
from loraformat.storage import MemoryStore

ONE = info("a", [2], F32_TENSOR, 0)
TWO = info("b", [2], F32_TENSOR, 32)


def opened(data: bytes) -> Header:
    return read_header(MemoryStore({"m.gguf": data}), "m.gguf")


FAULTS: dict[str, tuple[bytes, type[ContainerError], str]] = {
    "empty": (b"", NotATensorFile, 'does not begin with "GGUF"'),
    "another file": (b"PK\x03\x04" + bytes(40), NotATensorFile, "a zip archive"),
    "Git-LFS": (b"version https://git-lfs.github.com/spec/v1\n", GitLfsPointer, "Git-LFS"),
    "magic alone": (b"GGUF", TruncatedFile, "4 bytes"),
    "big-endian": (gguf(order=">"), InvalidHeader, "a big-endian GGUF file of version 3"),
    "version 1": (gguf(version=1), InvalidHeader, "GGUF version 1; only versions 2 and 3"),
    "version 4": (gguf(version=4), InvalidHeader, "GGUF version 4"),
    "more tensors than bytes": (gguf(counts=(1 << 40, 0)), TruncatedFile, "1099511627776 tensors"),
    "2**64 - 1 tensors": (gguf(counts=((1 << 64) - 1, 0)), TruncatedFile, "18446744073709551615 tensors"),
    "more settings than bytes": (gguf(counts=(0, 1 << 40)), TruncatedFile, "1099511627776 settings"),
    "one setting less": (gguf([number("a", 1)], counts=(0, 2)), TruncatedFile, "2 settings"),
    "key beyond the file": (
        gguf([struct.pack("<Q", 1 << 50) + bytes(32)]),
        TruncatedFile,
        "needs 1125899906842624 bytes",
    ),
    "key of 2**64 - 1 bytes": (gguf([struct.pack("<Q", (1 << 64) - 1) + bytes(32)]), TruncatedFile, "needs 184467"),
    "long key": (gguf([number("k" * 65_536, 1)]), InvalidHeader, "at most 65535 are allowed"),
    "empty key": (gguf([number("", 1)]), InvalidHeader, "setting 0 has no key"),
    "key not UTF-8": (gguf([field(b"\xff", U32, bytes(4))]), InvalidHeader, "is not UTF-8"),
    "key twice": (gguf([number("k", 1), number("k", 1)]), InvalidHeader, '"k" appears twice'),
    "unknown type": (gguf([field("k", 13, bytes(8))]), InvalidHeader, "the unknown type 13"),
    "boolean of 2": (gguf([field("k", BOOL, b"\x02")]), InvalidHeader, "a boolean stored as the byte 2"),
    "string not UTF-8": (gguf([field("k", STRING, text(b"\xc3"))]), InvalidHeader, 'the setting "k" is not UTF-8'),
    "string beyond the file": (
        gguf([field("k", STRING, struct.pack("<Q", 1 << 40))]),
        TruncatedFile,
        "needs 1099511627776 bytes",
    ),
    "nested array": (gguf([array("k", ARRAY, b"", 0)]), InvalidHeader, "an array of arrays"),
    "array of unknown type": (gguf([array("k", 77, b"", 0)]), InvalidHeader, "unknown type 77"),
    "array beyond the file": (gguf([array("k", U64, b"", 1 << 61)]), TruncatedFile, 'items of "k"'),
    "array of strings beyond the file": (gguf([array("k", STRING, b"", 1 << 61)]), TruncatedFile, 'items of "k"'),
    "long array with a string beyond the file": (
        gguf([array("k", STRING, bytes(8 * MOST_LISTED) + struct.pack("<Q", 1 << 40), MOST_LISTED + 1)]),
        TruncatedFile,
        "needs 1099511627776 bytes",
    ),
    "alignment 0": (gguf([number("general.alignment", 0)]), InvalidHeader, "a power of two, found 0"),
    "alignment 24": (gguf([number("general.alignment", 24)]), InvalidHeader, "a power of two, found 24"),
    "alignment of another type": (
        gguf([field("general.alignment", U64, struct.pack("<Q", 32))]),
        InvalidHeader,
        "expected a UINT32, found UINT64",
    ),
    "no name": (gguf([], [info("", [2], F32_TENSOR, 0)], bytes(8)), InvalidHeader, "tensor 0 has no name"),
    "long name": (gguf([], [info("n" * 64, [2], F32_TENSOR, 0)], bytes(8)), InvalidHeader, "at most 63"),
    "name twice": (gguf([], [ONE, info("a", [2], F32_TENSOR, 32)], bytes(40)), InvalidHeader, "a is listed twice"),
    "5 dimensions": (gguf([], [info("a", [1] * 5, F32_TENSOR, 0)], bytes(4)), InvalidHeader, "5 dimensions, at most 4"),
    "2**32 - 1 dimensions": (
        gguf([], [text("a") + b"\xff\xff\xff\xff" + bytes(20)]),
        InvalidHeader,
        "4294967295 dimensions",
    ),
    "overflow": (gguf([], [info("a", [1 << 62, 8], F32_TENSOR, 0)], bytes(8)), InvalidHeader, "overflows 63 bits"),
    "overflow beside a zero": (
        gguf([], [info("a", [0, 1 << 62, 8], F32_TENSOR, 0)]),
        InvalidHeader,
        "overflows 63 bits",
    ),
    "unknown element type": (gguf([], [info("a", [2], 4, 0)], bytes(8)), InvalidHeader, "unknown element type 4"),
    "half a block": (gguf([], [info("a", [48], Q8_0, 0)], bytes(51)), InvalidHeader, "rows of 48 are not whole blocks"),
    "offset not aligned": (
        gguf([], [info("a", [2], F32_TENSOR, 8)], bytes(16)),
        InvalidHeader,
        "offset 8 is not a mult",
    ),
    "overlap": (gguf([], [ONE, info("b", [2], F32_TENSOR, 0)], bytes(8)), InvalidHeader, "b begins 32 bytes before"),
    "gap": (
        gguf([], [ONE, info("b", [2], F32_TENSOR, 64)], bytes(72)),
        InvalidHeader,
        "32 bytes are unused between a and b",
    ),
    "gap at the start": (
        gguf([], [info("a", [2], F32_TENSOR, 32)], bytes(40)),
        InvalidHeader,
        "32 bytes are unused between the header",
    ),
    "data cut short": (
        gguf([], [ONE, TWO], bytes(39)),
        TruncatedFile,
        "the file has 135 bytes, but by its header it should have 136",
    ),
    "infos cut short": (gguf([], [ONE])[:52], TruncatedFile, "needs"),
    "bytes after the data": (gguf([], [ONE], bytes(33)), InvalidHeader, "1 byte is left after the last tensor"),
    "bytes after a header without tensors": (gguf() + bytes(64), InvalidHeader, "bytes are left"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_own_message(name: str) -> None:
    data, kind, message = FAULTS[name]
    with pytest.raises(kind) as caught:
        opened(data)
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert caught.value.location.subject == "m.gguf" or caught.value.location.file == "m.gguf"


GOOD = gguf(
    [string("general.type", "model"), number("x.count", 7), array("x.list", U32, struct.pack("<3I", 1, 2, 3), 3)],
    [info("w", [3, 2], F32_TENSOR, 0), info("v", [4], F16_TENSOR, 32)],
    struct.pack("<6f", *range(6)) + bytes(8) + np.arange(4, dtype="<f2").tobytes(),
)


def test_a_good_file_is_read() -> None:
    header = opened(GOOD)
    assert (header.version, header.alignment) == (3, 32)
    assert header.value("x.count") == 7
    assert header.value("x.list") == Array("UINT32", 3, (1, 2, 3))
    assert [(name, one.type.name, one.shape) for name, one in header.tensors.items()] == [
        ("w", "F32", (2, 3)),
        ("v", "F16", (4,)),
    ]
    assert header.tensors["v"].span == Span(header.data_start + 32, 8)
    entries = open_tensors(MemoryStore({"m.gguf": GOOD}), "m.gguf").entries
    assert entries["w"].load().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert entries["v"].read(1, 3).tolist() == [1, 2]


def test_version_2_and_padding_after_the_last_tensor_are_read() -> None:
    data = gguf([], [ONE], bytes(32), version=2)
    assert opened(data).version == 2
    assert opened(data[:-24]).tensors.keys() == {"a"}


def test_another_alignment_moves_the_data() -> None:
    data = gguf([number("general.alignment", 64)], [ONE, info("b", [2], F32_TENSOR, 64)], bytes(72), alignment=64)
    header = opened(data)
    assert header.data_start % 64 == 0
    assert header.tensors["b"].span.offset - header.data_start == 64


def test_long_arrays_are_known_by_their_length_alone() -> None:
    count = MOST_LISTED + 1
    texts = b"".join(text("t") for _ in range(count))
    header = opened(gguf([array("tokens", STRING, texts, count), array("scores", F32, bytes(4 * count), count)]))
    assert header.value("tokens") == Array("STRING", count, None)
    assert header.value("scores") == Array("FLOAT32", count, None)


def test_a_type_whose_codes_are_not_read_is_refused_when_its_values_are_wanted() -> None:
    kind = BY_NAME["IQ1_S"]
    data = gguf([], [info("w", [256, 2], kind.code, 0)], bytes(2 * kind.nbytes))
    (lazy,) = open_tensors(MemoryStore({"m.gguf": data}), "m.gguf").entries.values()
    assert lazy.shape == (2, 256)
    with pytest.raises(UnsupportedUpdate, match="IQ1_S"):
        lazy.load()


@given(data=st.binary(max_size=64), cut=st.integers(0, len(GOOD)))
@settings(max_examples=300, deadline=None)
def test_any_damage_is_read_or_refused(data: bytes, cut: int) -> None:
    changed = GOOD[:cut] + data + GOOD[cut + len(data) :]
    try:
        header = opened(changed)
    except LoraFormatError:
        return
    assert all(one.span.end <= len(changed) for one in header.tensors.values())


def test_every_prefix_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(LoraFormatError):
            opened(GOOD[:length])


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in package.constants.GGML_QUANT_SIZES.items()}
    assert {code: (one.name, one.elements, one.nbytes) for code, one in BY_CODE.items()} == theirs


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
NAMES = st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=15)
KINDS = {DType.F32: np.float32, DType.F16: np.float16, DType.F64: np.float64, DType.I32: np.int32, DType.I8: np.int8}
VALUES = st.one_of(
    st.text(max_size=20).filter(lambda one: "\0" not in one),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.floats(width=32, allow_nan=False),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
)


@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(KINDS, key=str)), SHAPES), max_size=5),
    values=st.dictionaries(NAMES, VALUES, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_the_gguf_package_reads_what_is_laid_out(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout = plan_file(tensors, encoded(values))
    out = bytearray(layout.nbytes)
    arrays = {}
    for number_, (name, (dtype, shape)) in enumerate(tensors.items()):
        arrays[name] = np.arange(np.prod(shape)).reshape(shape).astype(KINDS[dtype]) + number_
        span = layout.entries[name].span
        out[span.offset : span.end] = arrays[name].tobytes()
    for offset, data in layout.frame({}):
        out[offset : offset + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "laid-out.gguf"
    path.write_bytes(out)
    theirs = package.GGUFReader(path)
    assert {one.name: one.data.reshape(arrays[one.name].shape).tolist() for one in theirs.tensors} == {
        name: one.tolist() for name, one in arrays.items()
    }
    found = {key: one.contents() for key, one in theirs.fields.items() if not key.startswith("GGUF.")}
    assert found == values
    ours = opened(bytes(out))
    assert {name: (one.type.dtype, one.shape) for name, one in ours.tensors.items()} == tensors


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(3)
    writer.add_array("x.words", ["one", "two"])
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("q", package.quants.quantize(np.ones((2, 64), np.float32), package.GGMLQuantizationType.Q8_0),
                      raw_dtype=package.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = open_tensors(MemoryStore({"m.gguf": (tmp_path / "m.gguf").read_bytes()}), "m.gguf")
    assert tensors.extras["llama.block_count"] == 3
    assert tensors.extras["x.words"] == ["one", "two"]
    assert tensors.entries["w"].load().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors.entries["q"].load() == pytest.approx(np.ones((2, 64)), rel=1e-3)


def test_what_a_setting_or_a_tensor_cannot_be_is_refused() -> None:
    for value in (-1, 1 << 32, None, {"a": 1}, [1, "a"], []):
        with pytest.raises(ContainerError, match="GGUF"):
            encoded_field("k", value)
    for name, shape in (("n" * 64, (2,)), ("a", (1, 1, 1, 1, 1))):
        with pytest.raises(ContainerError):
            plan_file({name: (DType.F32, shape)}, Settings(0, b""))
    with pytest.raises(ContainerError, match="cannot store U64"):
        plan_file({"a": (DType.U64, (2,))}, Settings(0, b""))


def test_a_setting_of_one_byte_is_a_number() -> None:
    assert opened(gguf([field("k", U8, b"\x05")])).value("k") == 5
