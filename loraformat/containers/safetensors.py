"""safetensors: the header, parsed with a specific message for each fault, and the layout of files to write.

Source: safetensors 0.8.0, README.md "Format" and tensor.rs. What it reads and makes sense is read here. Refused beyond
it: white space before the header or other than spaces after it, repeated names, unknown fields of an entry, more than 8
dimensions, sub-byte types, and empty tensors whose sizes overflow 63 bits.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from loraformat.containers import strict_json
from loraformat.containers.rows import read_raw_rows, read_rows
from loraformat.containers.sniff import HEAD_NBYTES, MOST_HEADER_NBYTES, looks_like_safetensors, refuse_foreign
from loraformat.diagnostics import counted, show
from loraformat.errors import ContainerError, InvalidHeader, InvalidJson, TruncatedFile
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, Entry, LazyTensor, Span
from loraformat.storage.base import Source

METADATA = "__metadata__"
MOST_DIMENSIONS = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
_DTYPES = {dtype.safetensors: dtype for dtype in DType}
_MOST_SIZE = 1 << 53
_MOST_NBYTES = 1 << 63


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says, checked against the size of the file.

    Attributes:
        entries: name → entry, in the order of their bytes; spans count from the start of the file.
        data_start: the first byte after the header.
        nbytes: size of the file.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    nbytes: int


def read_header(store: Source, path: str) -> Header:
    """The header of a safetensors file.

    Raises:
        NotATensorFile (LF002): another kind of file under this name.
        TruncatedFile (LF004): the file ends before its header, or before the data that the header lists.
        InvalidHeader (LF003): a rule of the format is broken.
        StorageError (LF020): the file cannot be read.
    """
    nbytes = store.size(path)
    head = store.read(path, 0, min(nbytes, HEAD_NBYTES))
    if not looks_like_safetensors(head):
        refuse_foreign(head, path, zip_is_foreign=True)
    data_start = _data_start(head, nbytes, path)
    header = store.read(path, 8, data_start - 8)
    fields = _parsed(header, path)
    metadata = _metadata(fields, path)
    entries = {name: _entry(name, value, data_start, path) for name, value in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].span))
    _check_cover(ordered, data_start, nbytes, path)
    return Header(ordered, metadata, data_start, nbytes)


def lazy_tensors(store: Source, path: str, header: Header) -> dict[str, LazyTensor]:
    """Every tensor of the file by name, none of them loaded."""
    return {name: _lazy(store, path, entry) for name, entry in header.entries.items()}


def stored(path: str, entry: Entry) -> StoredTensor:
    """An entry together with its file."""
    return StoredTensor(path, entry.dtype, entry.shape, entry.span)


def _lazy(store: Source, path: str, entry: Entry) -> LazyTensor:
    return LazyTensor(
        entry.shape,
        entry.dtype,
        lambda start, stop: read_rows(store, stored(path, entry), start, stop),
        lambda start, stop: read_raw_rows(store, stored(path, entry), start, stop),
    )


def _data_start(head: bytes, nbytes: int, where: str) -> int:
    if nbytes < 8:
        raise TruncatedFile(f"{nbytes} bytes, the length of the header alone takes 8", where=where)
    (length,) = struct.unpack_from("<Q", head)
    if length > MOST_HEADER_NBYTES:
        raise InvalidHeader(f"a header of {length} bytes, at most {MOST_HEADER_NBYTES} are allowed", where=where)
    if length < 2:
        raise InvalidHeader(f"a header of {length} bytes, at least 2 are needed", where=where)
    if 8 + length > nbytes:
        raise TruncatedFile(f"the header ends at byte {8 + length}, the file at byte {nbytes}", where=where)
    return 8 + int(length)


def _parsed(header: bytes, where: str) -> dict[str, Json]:
    if not header.startswith(b"{"):
        raise InvalidHeader(f"the header begins with {show(header[:1])}, expected an opening brace", where=where)
    if not header.rstrip(b" ").endswith(b"}"):
        raise InvalidHeader("the header does not end with a closing brace and spaces", where=where)
    try:
        value = strict_json.parse(header, where, limit=MOST_HEADER_NBYTES)
    except InvalidJson as error:
        raise InvalidHeader(f"the header is not valid JSON: {error.message}", where=where) from error
    assert isinstance(value, dict)
    return value


def _metadata(fields: dict[str, Json], where: str) -> dict[str, str]:
    if METADATA not in fields:
        return {}
    value = fields.pop(METADATA)
    if value is None:  # as MLX 0.32 writes it where there is none
        return {}
    if not isinstance(value, dict):
        raise InvalidHeader(f"{METADATA}: expected an object, found {_kind(value)}", where=where)
    for key, text in value.items():
        if not isinstance(text, str):
            raise InvalidHeader(f'{METADATA}: "{_short(key)}": expected a string, found {_kind(text)}', where=where)
    return {key: text for key, text in value.items() if isinstance(text, str)}


def _entry(name: str, value: Json, data_start: int, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        _refuse_fields(name, value, where)
    content = _content(name, value["dtype"], value["shape"], where)
    begin, end = _offsets(name, value["data_offsets"], where)
    return _placed(name, content, begin, end, data_start, where)


class _Content(NamedTuple):
    """What a tensor holds, wherever it stands."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int


def _content(name: str, dtype_name: Json, sizes: Json, where: str) -> _Content:
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise InvalidHeader(f"{_short(name)}: unknown dtype {_short(json.dumps(dtype_name))}", where=where)
    shape = _shape(name, sizes, dtype, where)
    return _Content(dtype, shape, math.prod(shape) * dtype.itemsize)


def _placed(name: str, content: _Content, begin: int, end: int, data_start: int, where: str) -> Entry:
    dtype, shape, expected = content
    if end < begin:
        raise InvalidHeader(f"{_short(name)}: data_offsets: end {end} is before begin {begin}", where=where)
    if end - begin != expected:
        wanted = f"{dtype.safetensors} {list(shape)} takes {expected} bytes"
        raise InvalidHeader(f"{_short(name)}: {wanted}, data_offsets span {end - begin}", where=where)
    return Entry(dtype, shape, Span(data_start + begin, expected))


def _refuse_fields(name: str, value: Json, where: str) -> NoReturn:
    if not isinstance(value, dict):
        raise InvalidHeader(f"{_short(name)}: expected an object, found {_kind(value)}", where=where)
    missing, unknown = sorted(_FIELDS - value.keys()), sorted(value.keys() - _FIELDS)
    fault = f"{missing[0]} is missing" if missing else f'unknown field "{_short(unknown[0])}"'
    raise InvalidHeader(f"{_short(name)}: {fault}", where=where)


def _shape(name: str, value: Json, dtype: DType, where: str) -> tuple[int, ...]:
    sizes = _integers(value)
    if sizes is None:
        raise InvalidHeader(f"{_short(name)}: shape: expected a list of integers of at least 0", where=where)
    if len(sizes) > MOST_DIMENSIONS:
        raise InvalidHeader(
            f"{_short(name)}: {len(sizes)} dimensions, at most {MOST_DIMENSIONS} are allowed", where=where
        )
    if 0 in sizes and math.prod(max(size, 1) for size in sizes) * dtype.itemsize >= _MOST_NBYTES:
        raise InvalidHeader(f"{_short(name)}: shape: {list(sizes)} overflows 63 bits", where=where)
    return sizes


def _offsets(name: str, value: Json, where: str) -> tuple[int, int]:
    offsets = _integers(value)
    if offsets is None or len(offsets) != 2:
        raise InvalidHeader(f"{_short(name)}: data_offsets: expected two integers of at least 0", where=where)
    return offsets[0], offsets[1]


def _integers(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    found: list[int] = []
    for size in value:
        if type(size) is not int or not 0 <= size < _MOST_SIZE:
            return None
        found.append(size)
    return tuple(found)


def _check_cover(entries: Mapping[str, Entry], data_start: int, nbytes: int, where: str) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, previous = data_start, "the header"
    for name, entry in entries.items():
        gap = entry.span.offset - position
        if gap > 0:
            raise InvalidHeader(
                f"{counted(gap, 'byte', 'is')} unused between {_short(previous)} and {_short(name)}", where=where
            )
        if gap < 0:
            raise InvalidHeader(f"{_short(previous)} and {_short(name)} overlap by {-gap} bytes", where=where)
        position, previous = entry.span.end, name
    if position > nbytes:
        raise TruncatedFile(f"the file has {nbytes} bytes, but by its header it should have {position}", where=where)
    if position < nbytes:
        raise InvalidHeader(f"{counted(nbytes - position, 'byte', 'is')} left after the last tensor", where=where)


def _kind(value: Json) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(text: str) -> str:
    return show(text, 200)


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """See Layout."""

    entries: Mapping[str, Entry]
    nbytes: int
    header: bytes
    needs_checksums: bool = False

    def frame(self, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:  # noqa: ARG002 - safetensors has none
        """See Layout."""
        return [(0, self.header)]


def plan_file(
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> SafetensorsLayout:
    """A file with these tensors, wide element types first and then by name, so that every tensor is aligned.

    Raises: ContainerError: a name that the format reserves, or a header beyond its limit.
    """
    if METADATA in tensors:
        raise ContainerError(f"a safetensors file cannot hold a tensor called {METADATA}")
    spans: dict[str, Entry] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        spans[name] = Entry(dtype, shape, Span(position, math.prod(shape) * dtype.itemsize))
        position = spans[name].span.end
    header = _header_bytes(spans, metadata or {})
    entries = {
        name: Entry(entry.dtype, entry.shape, Span(len(header) + entry.span.offset, entry.span.nbytes))
        for name, entry in spans.items()
    }
    return SafetensorsLayout(entries, len(header) + position, header)


def _header_bytes(spans: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name, entry in spans.items():
        offsets = [entry.span.offset, entry.span.end]
        fields[name] = {"dtype": entry.dtype.safetensors, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    padded = text + b" " * (-len(text) % 8)
    if len(padded) > MOST_HEADER_NBYTES:
        raise ContainerError(f"the header would take {len(padded)} bytes, at most {MOST_HEADER_NBYTES} are allowed")
    return struct.pack("<Q", len(padded)) + padded
