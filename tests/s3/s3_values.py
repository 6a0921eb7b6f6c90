"""What the S3 server of the tests checks bodies with, and what it keeps."""

from __future__ import annotations

import hashlib
import struct
import time
import urllib.parse
import zlib
from datetime import datetime, timezone
from xml.sax.saxutils import escape

MIN_PART, MOST_PARTS, MOST_COPY, PAGE = 5 << 20, 10000, 5 << 30, 1000
BLOCK = 1 << 20


def crc_table(poly: int, width: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (poly if value & 1 else 0)
        table.append(value)
    return table


class _Crc:
    """A reflected CRC in pure Python: slow, for small bodies only."""

    def __init__(self, poly: int, nbytes: int) -> None:
        self._table, self._nbytes, self._mask = crc_table(poly, nbytes * 8), nbytes, (1 << nbytes * 8) - 1
        self._value = self._mask

    def update(self, data: bytes) -> None:
        value, table = self._value, self._table
        for byte in data:
            value = table[(value ^ byte) & 255] ^ value >> 8
        self._value = value

    def digest(self) -> bytes:
        return (self._value ^ self._mask).to_bytes(self._nbytes, "big")


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return struct.pack(">I", self._value)


SUMS = {
    "crc32": _Crc32,
    "sha1": hashlib.sha1,
    "sha256": hashlib.sha256,
    "crc32c": lambda: _Crc(0x82F63B78, 4),
    "crc64nvme": lambda: _Crc(0x9A6C9329AC4BC9B5, 8),
}
SLOW_SUMS = 4 << 20  # larger bodies are not checked by sums in pure Python


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message or code


class Object:
    def __init__(self, path: str, nbytes: int, etag: str, headers: dict[str, str]) -> None:
        self.path, self.nbytes, self.etag, self.headers, self.time = path, nbytes, etag, headers, time.time()


def quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="-_.~")


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def xml_error(code: str, message: str) -> bytes:
    content = f"<Code>{code}</Code><Message>{escape(message)}</Message><RequestId>1</RequestId>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{content}</Error>'.encode()
