"""The layout of a GGUF file to write: the header is complete before any value is written.

Source: the GGUF specification, version 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat.containers.gguf.header import ALIGNMENT, MAGIC, MOST_DIMENSIONS, MOST_NAME_NBYTES, read_header
from loraformat.containers.gguf.types import BY_DTYPE, VALUE_BY_NAME, ElementType
from loraformat.errors import ContainerError
from loraformat.model.bundle import Json
from loraformat.model.tensors import DType, Entry, Span
from loraformat.storage.base import Source

_VERSION = 3
_FILE_TYPE = "general.file_type"
# Source: llama.cpp of llama_cpp_python 0.3.36, include/llama.h `llama_ftype`.
_FILE_TYPES = {DType.F32: 0, DType.F16: 1, DType.BF16: 32}

Shapes = Mapping[str, tuple[DType, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a header as they are written.

    Attributes:
        count: how many there are.
        data: their bytes, one after the other.
        alignment: that they state, or the format's own.
        types: tensors in block types, whose bytes a plan has as rows of U8, by name.
    """

    count: int
    data: bytes
    alignment: int = ALIGNMENT
    types: Mapping[str, ElementType] | None = None


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """See Layout."""

    entries: Mapping[str, Entry]
    nbytes: int
    header: bytes
    padding: tuple[tuple[int, int], ...]
    needs_checksums: bool = False

    def frame(self, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:  # noqa: ARG002 - GGUF has none
        """See Layout."""
        return [(0, self.header), *((offset, bytes(count)) for offset, count in self.padding)]


def plan_file(tensors: Shapes, settings: Settings) -> GgufLayout:
    """A file with these tensors in their order, each at a multiple of the alignment, and zeros between them.

    Raises: ContainerError: a name, an element type or a number of dimensions that GGUF cannot hold.
    """
    infos, offsets, position = [], {}, 0
    for name, (dtype, shape) in tensors.items():
        kind = (settings.types or {}).get(name) if dtype is DType.U8 else BY_DTYPE.get(dtype)
        infos.append(_info(name, dtype, shape, kind, position))
        end = position + math.prod(shape) * dtype.itemsize
        offsets[name] = (position, end)
        position = _padded(end, settings.alignment)
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), settings.count) + settings.data + b"".join(infos)
    start = _padded(len(head), settings.alignment)
    entries = {
        name: Entry(dtype, shape, Span(start + offsets[name][0], offsets[name][1] - offsets[name][0]))
        for name, (dtype, shape) in tensors.items()
    }
    ends = [start + end for _, end in offsets.values()]
    padding = tuple((end, _padded(end, settings.alignment) - end) for end in ends if end % settings.alignment)
    return GgufLayout(entries, start + position, head.ljust(start, b"\0"), padding)


def like(store: Source, path: str, tensors: Shapes) -> Settings:
    """The settings of a file, byte for byte, for a file with these tensors in the place of its own.

    `general.file_type` changes where the file has no tensor in a block type any more; tensors in rows of U8 are those
    of the same name in the file.
    """
    header = read_header(store, path)
    parts = []
    for key, found in header.fields.items():
        data = store.read(path, *found.span)
        if key == _FILE_TYPE and found.type == "UINT32":
            data = data[:-4] + struct.pack("<I", _file_type(tensors, int.from_bytes(data[-4:], "little")))
        parts.append(data)
    types = {name: info.type for name, info in header.tensors.items() if info.type.dtype is None}
    return Settings(len(parts), b"".join(parts), header.alignment, types)


def _file_type(tensors: Shapes, before: int) -> int:
    """What the matrices of a file are stored as, where all of them are plain numbers of one type."""
    dtypes = {dtype for dtype, shape in tensors.values() if len(shape) > 1}
    return _FILE_TYPES.get(dtypes.pop(), before) if len(dtypes) == 1 else before


def encoded(values: Mapping[str, Json]) -> Settings:
    """Settings with these values: text, booleans, integers as UINT32, other numbers as FLOAT32, lists of one of them.

    >>> encoded({"general.type": "adapter", "adapter.lora.alpha": 16.0}).count
    2

    Raises: ContainerError: a value of another kind, or an integer that UINT32 does not hold.
    """
    return Settings(len(values), b"".join(field(key, value) for key, value in values.items()))


def field(key: str, value: Json) -> bytes:
    """One setting: key, type and value. Raises: as `encoded`."""
    if isinstance(value, list):
        kinds = {_type_of(key, item) for item in value}
        if len(kinds) != 1:
            raise ContainerError(f"{key}: all items of a GGUF list must have one type")
        (kind,) = kinds
        items = b"".join(_scalar(kind, item) for item in value)
        code = struct.pack("<IIQ", VALUE_BY_NAME["ARRAY"].code, VALUE_BY_NAME[kind].code, len(value))
        return _text(key) + code + items
    kind = _type_of(key, value)
    return _text(key) + struct.pack("<I", VALUE_BY_NAME[kind].code) + _scalar(kind, value)


def _type_of(key: str, value: Json) -> str:
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, str):
        return "STRING"
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return "UINT32"
    if isinstance(value, float):
        return "FLOAT32"
    raise ContainerError(f"{key}: GGUF settings cannot hold this value")


def _scalar(kind: str, value: Json) -> bytes:
    layout = VALUE_BY_NAME[kind].layout
    if layout is None:
        assert isinstance(value, str)
        return _text(value)
    return layout.pack(value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _info(name: str, dtype: DType, shape: Sequence[int], kind: ElementType | None, offset: int) -> bytes:
    if kind is None:
        raise ContainerError(f"{name}: GGUF files cannot store {dtype.safetensors}")
    if len(name.encode("utf-8")) > MOST_NAME_NBYTES or not name:
        raise ContainerError(f"{name}: expected a name of 1 to {MOST_NAME_NBYTES} bytes")
    if len(shape) > MOST_DIMENSIONS:
        raise ContainerError(f"{name}: {len(shape)} dimensions, a GGUF file holds at most {MOST_DIMENSIONS}")
    sizes = list(reversed(shape))
    if kind.dtype is None:  # rows of bytes stand for rows of blocks
        sizes[0] = sizes[0] // kind.nbytes * kind.elements
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind.code, offset)


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
