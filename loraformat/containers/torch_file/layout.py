"""The layout of a torch file to write: the zip around the tensors, known before any value.

Records are stored, begin at multiples of 64 bytes as torch.save has it, and bear no date, so that equal contents give
equal bytes. Source: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3; torch 2.13, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.containers.torch_file.pickle_writer import Whole, write_pickle
from loraformat.errors import ContainerError
from loraformat.model.bundle import Json
from loraformat.model.tensors import DType, Entry, Span

ALIGNMENT = 64
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_UTF8 = 1 << 11
_DATE = (1 << 5) | 1  # 1 January 1980, the first that zip can express
_VERSION, _VERSION64 = 20, 45
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A record of the archive and its place.

    Attributes:
        tensor: whose bytes it holds, or None where `data` has them.
        local, offset: where its header and its first byte stand.
    """

    name: bytes
    tensor: str | None
    data: bytes
    nbytes: int
    local: int
    offset: int


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """See Layout."""

    entries: Mapping[str, Entry]
    nbytes: int
    records: tuple[_Planned, ...]
    needs_checksums: bool = True

    def frame(self, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """See Layout."""
        parts: list[tuple[int, bytes]] = []
        centrals: list[bytes] = []
        for record in self.records:
            crc32 = zlib.crc32(record.data) if record.tensor is None else checksums[record.tensor]
            parts.append((record.local, _local_header(record, crc32) + record.data))
            centrals.append(_central_header(record, crc32))
        directory = b"".join(centrals)
        start = _end_of(self.records)
        parts.append((start, directory + _end_records(len(centrals), len(directory), start)))
        return parts


def plan_file(
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    *,
    wrapper: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    name: str = "archive",
    extras: Mapping[str, Json] | None = None,
) -> TorchLayout:
    """A file that `torch.load(…, weights_only=True)` opens as a dict of these tensors, in their order.

    Args:
        wrapper: keys of dicts around the tensors, outermost first.
        aliases: further names → the name in `tensors` whose storage they share.
        name: the top folder of the archive.
        extras: plain values beside the tensors, by dotted key as in `model.bundle.Tensors`.

    Raises: ContainerError: a key of `extras` that is a tensor or a wrapper already.
    """
    shared = aliases or {}
    whole = {key: Whole(str(number), dtype, shape) for number, (key, (dtype, shape)) in enumerate(tensors.items())}
    inner: dict[str, object] = {**whole, **{alias: whole[target] for alias, target in shared.items()}}
    pickle = write_pickle(_wrapped(inner, wrapper, extras or {}))
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape) in tensors.items()}
    contents: list[tuple[str, str | None, bytes, int]] = [
        ("data.pkl", None, pickle, len(pickle)),
        ("byteorder", None, b"little", 6),
        *((f"data/{whole[key].key}", key, b"", nbytes) for key, nbytes in sizes.items()),
        ("version", None, b"3\n", 2),
    ]
    records = _placed(contents, name)
    spans = {record.tensor: Span(record.offset, record.nbytes) for record in records if record.tensor is not None}
    entries = {key: Entry(dtype, shape, spans[key]) for key, (dtype, shape) in tensors.items()}
    entries |= {alias: entries[target] for alias, target in shared.items()}
    start = _end_of(records)
    length = sum(len(_central_header(record, 0)) for record in records)
    end = len(_end_records(len(records), length, start))
    return TorchLayout(entries, start + length + end, records)


def _wrapped(inner: dict[str, object], wrapper: tuple[str, ...], extras: Mapping[str, Json]) -> dict[str, object]:
    levels: list[dict[str, object]] = [{} for _ in wrapper] + [inner]
    for number, key in enumerate(wrapper):
        levels[number][key] = levels[number + 1]
    for dotted, value in extras.items():
        number, key = 0, dotted
        while number < len(wrapper) and key.startswith(f"{wrapper[number]}."):
            key = key.removeprefix(f"{wrapper[number]}.")
            number += 1
        if key in levels[number]:
            raise ContainerError(f'"{dotted}" cannot be stored with the tensors: a tensor already has that name')
        levels[number][key] = value
    return levels[0]


def _placed(contents: list[tuple[str, str | None, bytes, int]], top: str) -> tuple[_Planned, ...]:
    records: list[_Planned] = []
    position = 0
    for short, tensor, data, nbytes in contents:
        name = f"{top}/{short}".encode()
        least = position + _LOCAL.size + len(name) + (20 if nbytes >= _FULL32 else 0)
        # The padding is an extra field, whose own header takes 4 bytes.
        offset = least if least % ALIGNMENT == 0 else -(-(least + 4) // ALIGNMENT) * ALIGNMENT
        records.append(_Planned(name, tensor, data, nbytes, position, offset))
        position = offset + nbytes
    return tuple(records)


def _end_of(records: tuple[_Planned, ...]) -> int:
    return records[-1].offset + records[-1].nbytes


def _local_header(record: _Planned, crc32: int) -> bytes:
    is_wide = record.nbytes >= _FULL32
    extra = struct.pack("<2H2Q", 1, 16, record.nbytes, record.nbytes) if is_wide else b""
    padding = record.offset - record.local - _LOCAL.size - len(record.name) - len(extra)
    if padding:
        extra += struct.pack("<2s1H", b"FB", padding - 4) + bytes(padding - 4)
    size = _FULL32 if is_wide else record.nbytes
    version = _VERSION64 if is_wide else _VERSION
    fields = (b"PK\x03\x04", version, _UTF8, 0, 0, _DATE, crc32, size, size, len(record.name), len(extra))
    return _LOCAL.pack(*fields) + record.name + extra


def _central_header(record: _Planned, crc32: int) -> bytes:
    wide: list[int] = []
    size, local = record.nbytes, record.local
    if size >= _FULL32:
        wide += [size, size]
        size = _FULL32
    if local >= _FULL32:
        wide.append(local)
        local = _FULL32
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _VERSION64 if wide else _VERSION
    fields = (version, version, _UTF8, 0, 0, _DATE, crc32, size, size, len(record.name), len(extra), 0, 0, 0, 0, local)
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + record.name + extra


def _end_records(count: int, length: int, start: int) -> bytes:
    wide = b""
    if count >= _FULL16 or length >= _FULL32 or start >= _FULL32:
        fields = (44, _VERSION64, _VERSION64, 0, 0, count, count, length, start)
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *fields)
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1)
    count, length, start = min(count, _FULL16), min(length, _FULL32), min(start, _FULL32)
    return wide + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, length, start, 0)
