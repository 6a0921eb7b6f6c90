"""The header of a GGUF file, parsed with a specific message for each fault.

Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md); gguf 0.19.0, gguf_reader.py; llama.cpp of
llama_cpp_python 0.3.36, ggml/src/gguf.cpp. What llama.cpp reads is read here. Refused beyond it: bytes after the data,
text that is not UTF-8, booleans that are neither 0 nor 1, and headers of more than 256 MiB.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias, Union

from loraformat.containers.gguf.types import BY_CODE, VALUE_BY_CODE, ElementType, ValueType
from loraformat.containers.sniff import HEAD_NBYTES, refuse_foreign
from loraformat.diagnostics import counted, show
from loraformat.errors import InvalidHeader, NotATensorFile, TruncatedFile
from loraformat.model.tensors import Span
from loraformat.storage.base import Source

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MOST_DIMENSIONS = 4
MOST_NAME_NBYTES = 63  # `GGML_MAX_NAME` counts the zero at the end
MOST_HEADER_NBYTES = 256 << 20
_MOST_KEY_NBYTES = 65_535
_MOST_NBYTES = 1 << 63
# Arrays up to this length are values; longer ones, those of tokenizers, are known by type and length alone.
MOST_LISTED = 4096
_PREFIX_NBYTES = 24
_BLOCK_NBYTES = 1 << 20
# The least bytes of a setting (key length, key, type, value) and of a tensor (name length, name, axes, type, offset).
_LEAST_FIELD, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 4 + 8

Scalar: TypeAlias = Union[int, float, bool, str]


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the header.

    Attributes:
        type: of its items, "STRING" or a type of numbers.
        count: how many.
        items: the items; None where there are more than MOST_LISTED.
    """

    type: str
    count: int
    items: tuple[Scalar, ...] | None


Value: TypeAlias = Union[Scalar, Array]


class Field(NamedTuple):
    """A setting of the header: the name of its type, its value, and its bytes in the file, key and type included."""

    type: str
    value: Value
    span: Span


class TensorInfo(NamedTuple):
    """A tensor: `shape` is row-major, the reverse of what the file lists; `span` counts from the start of the file."""

    type: ElementType
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a GGUF file says, checked against the size of the file.

    Attributes:
        fields: the settings by key, in order.
        tensors: by name, in the order of their bytes.
        data_start: the first byte of the data.
        nbytes: size of the file.
    """

    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    nbytes: int

    def value(self, key: str) -> Value | None:
        """The value of a setting, or None."""
        found = self.fields.get(key)
        return None if found is None else found.value


def read_header(store: Source, path: str) -> Header:
    """The header of a GGUF file.

    Raises:
        NotATensorFile (LF002): another kind of file under this name.
        TruncatedFile (LF004): the file ends before its header, or before the data that the header lists.
        InvalidHeader (LF003): a rule of the format is broken; big-endian files and version 1 among them.
        StorageError (LF020): the file cannot be read.
    """
    nbytes = store.size(path)
    head = store.read(path, 0, min(nbytes, HEAD_NBYTES))
    if not head.startswith(MAGIC):
        refuse_foreign(head, path, zip_is_foreign=True)
        raise NotATensorFile('the file does not begin with "GGUF"', where=path, hint="download it again")
    if nbytes < _PREFIX_NBYTES:
        raise TruncatedFile(f"{nbytes} bytes, the fixed part of the header alone takes {_PREFIX_NBYTES}", where=path)
    version = _version(head, path)
    reader = _Reader(store, path, nbytes)
    reader.skip(8)
    tensor_count, field_count = reader.number("<Q"), reader.number("<Q")
    reader.check_count(tensor_count, _LEAST_TENSOR, "tensors")
    reader.check_count(field_count, _LEAST_FIELD, "settings")
    fields: dict[str, Field] = {}
    for number in range(field_count):
        key, field = _field(reader, number)
        if key in fields:
            raise reader.wrong(f'the setting "{_short(key)}" appears twice')
        fields[key] = field
    alignment = _alignment(fields, path)
    listed = [_listed(reader, number) for number in range(tensor_count)]
    data_start = _padded(reader.position, alignment)
    tensors = _placed(listed, alignment, data_start, path)
    _check_end(tensors, alignment, data_start, nbytes, path)
    return Header(version, alignment, fields, tensors, data_start, nbytes)


class _Reader:
    """Takes the header from the file piece by piece; no more of it is in memory than the header is long."""

    def __init__(self, store: Source, path: str, nbytes: int) -> None:
        self._store, self.path, self._nbytes = store, path, nbytes
        self._buffer, self.position = bytearray(), 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.position
        self.skip(count)
        return bytes(self._buffer[start : self.position])

    def skip(self, count: int) -> None:
        """Step over bytes."""
        end = self.position + count
        if end > self._nbytes:
            text = f"the header needs {count} bytes at byte {self.position}, the file ends at byte {self._nbytes}"
            raise TruncatedFile(text, where=self.path)
        if end > MOST_HEADER_NBYTES:
            raise self.wrong(f"the header is larger than {MOST_HEADER_NBYTES} bytes, the most that is read")
        if end > len(self._buffer):
            more = max(end - len(self._buffer), _BLOCK_NBYTES)
            self._buffer += self._store.read(self.path, len(self._buffer), min(more, self._nbytes - len(self._buffer)))
        self.position = end

    def number(self, layout: str) -> int:
        """The next number of a layout of `struct`."""
        start = self.position
        self.skip(struct.calcsize(layout))
        (found,) = struct.unpack_from(layout, self._buffer, start)
        return int(found)

    def text(self, what: str, most: int = MOST_HEADER_NBYTES) -> str:
        """The next string of at most `most` bytes."""
        length = self.number("<Q")
        if length > most and length <= self._nbytes:
            raise self.wrong(f"{what} of {length} bytes, at most {most} are allowed")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8: {show(data[:40])}") from None

    def skip_texts(self, count: int) -> None:
        """Step over strings without keeping them."""
        for _ in range(count):
            self.skip(self.number("<Q"))

    def check_count(self, count: int, least_nbytes: int, what: str) -> None:
        """Refuse a count of things that the rest of the file has no room for."""
        left = self._nbytes - self.position
        if count * least_nbytes > left:
            text = f"{count} {what} take at least {count * least_nbytes} bytes, the file has {left} more"
            raise TruncatedFile(text, where=self.path)

    def wrong(self, message: str) -> InvalidHeader:
        """An error about this header."""
        return InvalidHeader(message, where=self.path)


def _version(head: bytes, where: str) -> int:
    (version,) = struct.unpack_from("<I", head, 4)
    (swapped,) = struct.unpack_from(">I", head, 4)
    if version in VERSIONS:
        return int(version)
    if swapped in (1, *VERSIONS):
        raise InvalidHeader(
            f"a big-endian GGUF file of version {swapped}; only little-endian files are supported",
            where=where,
            hint="convert it with gguf_convert_endian.py of the gguf package",
        )
    raise InvalidHeader(
        f"GGUF version {version}; only versions 2 and 3 are supported",
        where=where,
        hint="convert it again with a current llama.cpp",
    )


def _field(reader: _Reader, number: int) -> tuple[str, Field]:
    start = reader.position
    key = reader.text(f"the key of setting {number}", _MOST_KEY_NBYTES)
    if not key:
        raise reader.wrong(f"setting {number} has no key")
    kind = _value_type(reader, key)
    value = _array(reader, key) if kind.name == "ARRAY" else _scalar(reader, kind, key)
    return key, Field(kind.name, value, Span(start, reader.position - start))


def _value_type(reader: _Reader, key: str) -> ValueType:
    code = reader.number("<I")
    if code not in VALUE_BY_CODE:
        raise reader.wrong(f'the setting "{_short(key)}" has the unknown type {code}')
    return VALUE_BY_CODE[code]


def _scalar(reader: _Reader, kind: ValueType, key: str) -> Scalar:
    if kind.layout is None:
        return reader.text(f'the setting "{_short(key)}"')
    (value,) = kind.layout.unpack(reader.take(kind.layout.size))
    found: Scalar = value
    if kind.name == "BOOL":
        if value not in (0, 1):
            raise reader.wrong(f'the setting "{_short(key)}" is a boolean stored as the byte {value}')
        return bool(value)
    return found


def _array(reader: _Reader, key: str) -> Array:
    kind = _value_type(reader, key)
    if kind.name == "ARRAY":
        raise reader.wrong(f'the setting "{_short(key)}" is an array of arrays, which llama.cpp does not read')
    count = reader.number("<Q")
    nbytes = 8 if kind.layout is None else kind.layout.size
    reader.check_count(count, nbytes, f'items of "{_short(key)}"')
    if count <= MOST_LISTED:
        return Array(kind.name, count, tuple(_scalar(reader, kind, key) for _ in range(count)))
    if kind.layout is None:
        reader.skip_texts(count)
    else:
        reader.skip(count * nbytes)
    return Array(kind.name, count, None)


def _alignment(fields: Mapping[str, Field], where: str) -> int:
    field = fields.get(ALIGNMENT_KEY)
    if field is None:
        return ALIGNMENT
    if field.type != "UINT32" or not isinstance(field.value, int):
        raise InvalidHeader(f"{ALIGNMENT_KEY}: expected a UINT32, found {field.type}", where=where)
    if field.value == 0 or field.value & (field.value - 1):
        raise InvalidHeader(f"{ALIGNMENT_KEY}: expected a power of two, found {field.value}", where=where)
    return field.value


class _Listed(NamedTuple):
    name: str
    type: ElementType
    shape: tuple[int, ...]
    offset: int


def _listed(reader: _Reader, number: int) -> _Listed:
    name = reader.text(f"the name of tensor {number}", MOST_NAME_NBYTES)
    if not name:
        raise reader.wrong(f"tensor {number} has no name")
    axes = reader.number("<I")
    if axes > MOST_DIMENSIONS:
        raise reader.wrong(f"{_short(name)}: {axes} dimensions, at most {MOST_DIMENSIONS} are allowed")
    sizes = tuple(reader.number("<Q") for _ in range(axes))
    code = reader.number("<I")
    kind = BY_CODE.get(code)
    if kind is None:
        raise reader.wrong(f"{_short(name)}: unknown element type {code}")
    if math.prod(max(size, 1) for size in sizes) * kind.nbytes >= _MOST_NBYTES:
        raise reader.wrong(f"{_short(name)}: the shape {list(sizes)} overflows 63 bits")
    if (sizes[0] if sizes else 1) % kind.elements:
        text = (
            f"{_short(name)}: rows of {sizes[0] if sizes else 1} are not whole blocks of {kind.elements} ({kind.name})"
        )
        raise reader.wrong(text)
    return _Listed(name, kind, tuple(reversed(sizes)), reader.number("<Q"))


def _placed(listed: list[_Listed], alignment: int, data_start: int, where: str) -> dict[str, TensorInfo]:
    """The tensors, each where the one before it ends, padded: llama.cpp reads no other order, nor gaps."""
    found: dict[str, TensorInfo] = {}
    position, previous = 0, "the header"
    for name, kind, shape, offset in listed:
        if name in found:
            raise InvalidHeader(f"{_short(name)} is listed twice", where=where)
        if offset % alignment:
            text = f"{_short(name)}: offset {offset} is not a multiple of the alignment, {alignment}"
            raise InvalidHeader(text, where=where)
        if offset < position:
            text = f"{_short(name)} begins {position - offset} bytes before the end of {_short(previous)}"
            raise InvalidHeader(text, where=where)
        if offset > position:
            text = f"{counted(offset - position, 'byte', 'is')} unused between {_short(previous)} and {_short(name)}"
            raise InvalidHeader(text, where=where)
        nbytes = kind.nbytes_of(shape)
        found[name] = TensorInfo(kind, shape, Span(data_start + offset, nbytes))
        position, previous = _padded(offset + nbytes, alignment), name
    return found


def _check_end(tensors: Mapping[str, TensorInfo], alignment: int, data_start: int, nbytes: int, where: str) -> None:
    """The file ends with the last tensor, or with the padding after it; without tensors, with the header."""
    last = max((info.span.end for info in tensors.values()), default=min(data_start, nbytes))
    if last > nbytes:
        raise TruncatedFile(f"the file has {nbytes} bytes, but by its header it should have {last}", where=where)
    if nbytes > _padded(last, alignment):
        raise InvalidHeader(
            f"{counted(nbytes - _padded(last, alignment), 'byte', 'is')} left after the last tensor", where=where
        )


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


_short = partial(show, limit=200)
