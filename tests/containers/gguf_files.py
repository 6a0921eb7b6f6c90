"""GGUF files byte by byte, for tests: nothing is shared with the package's own reader or layout."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Codes of types of settings: gguf 0.19.0, constants.py `GGUFValueType`.
U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
# Codes of element types: `GGMLQuantizationType`.
F32_TENSOR, F16_TENSOR, Q8_0 = 0, 1, 8


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, code: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + payload


def string(key: str, value: str) -> bytes:
    return field(key, STRING, text(value))


def number(key: str, value: int) -> bytes:
    return field(key, U32, struct.pack("<I", value))


def array(key: str, code: int, payload: bytes, count: int) -> bytes:
    return field(key, ARRAY, struct.pack("<IQ", code, count) + payload)


def info(name: str | bytes, dims: Sequence[int], code: int, offset: int) -> bytes:
    """`dims` as the file has them: the innermost first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def gguf(
    fields: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    order: str = "<",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensors, settings = counts or (len(infos), len(fields))
    head = b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, settings) + b"".join((*fields, *infos))
    return head + bytes(-len(head) % alignment) + data if infos else head
