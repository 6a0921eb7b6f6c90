"""The directory of a zip file as torch.save writes it, read strictly: two readers cannot see two different archives.

Source: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.diagnostics import show
from loraformat.errors import ContainerError, InvalidHeader, TruncatedFile
from loraformat.storage.base import Source

MOST_RECORDS = 100_000
MOST_DIRECTORY_NBYTES = 64 << 20
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR_FOLLOWS, _UTF8 = 1 << 3, 1 << 11
_BLOCK_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A file of the archive, stored as it is.

    Attributes:
        name: without the top folder.
        offset: of its first byte in the zip file.
        crc32: 0 where the writer did not compute it.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Central:
    """One entry of the central directory."""

    name: bytes
    flags: int
    crc32: int
    nbytes: int
    local: int


def read_directory(store: Source, path: str, nbytes: int, *, has_folder: bool = True) -> Mapping[str, Record]:
    """The records of a zip file of `nbytes` bytes, by name without the top folder, in the order of the directory.

    Args:
        has_folder: whether all records lie in one top folder, as torch.save has it; else none lies in any.

    Raises:
        TruncatedFile: the end of the archive is missing, or a record lies beyond the end of the file.
        InvalidHeader: bytes before or after the archive, compressed or encrypted records, repeated or unsafe names,
            overlapping records, a local header that contradicts the directory.
    """
    start, count, length = _find_directory(store, path, nbytes)
    if count > MOST_RECORDS or length > MOST_DIRECTORY_NBYTES:
        raise InvalidHeader(f"{count} records, at most {MOST_RECORDS} are read", where=path)
    centrals = _read_centrals(store.read(path, start, length), count, path)
    names = _checked_names([central.name for central in centrals], path, has_folder=has_folder)
    records: dict[str, Record] = {}
    position = 0
    for name, central in sorted(zip(names, centrals, strict=True), key=lambda pair: pair[1].local):
        if not records and central.local:
            raise InvalidHeader(f"{central.local} bytes precede the archive", where=path)
        if central.local < position:
            raise InvalidHeader(f'record "{show(name)}" overlaps the one before', where=path)
        record = _read_local(store, path, name, central, start)
        records[name] = record
        position = record.offset + record.nbytes
    return {name: records[name] for name in names}


def check_record(store: Source, path: str, record: Record) -> None:
    """Raises: ContainerError: the bytes of a record do not have its CRC-32, which is not 0."""
    if not record.crc32:
        return
    crc32 = 0
    buffer = memoryview(bytearray(min(record.nbytes, _BLOCK_NBYTES)))
    for done in range(0, record.nbytes, _BLOCK_NBYTES):
        block = buffer[: min(_BLOCK_NBYTES, record.nbytes - done)]
        store.read_into(path, record.offset + done, block)
        crc32 = zlib.crc32(block, crc32)
    if crc32 != record.crc32:
        found = f"its CRC-32 is {crc32:08x}, the directory says {record.crc32:08x}"
        raise ContainerError(
            f'record "{show(record.name)}" is damaged: {found}',
            where=path,
            hint="copy or download the file again",
        )


def _find_directory(store: Source, path: str, nbytes: int) -> tuple[int, int, int]:
    """Offset, number of entries and length of the central directory, which must fill the file up to its end record."""
    tail_nbytes = min(nbytes, _END.size + _END64_LOCATOR.size)
    tail = store.read(path, nbytes - tail_nbytes, tail_nbytes)
    if tail_nbytes < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise TruncatedFile(
            "the zip directory is not at the end of the file: it was cut off, or something was appended", where=path
        )
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    end = nbytes - _END.size
    if tail[:4] == b"PK\x06\x07" and tail_nbytes == _END.size + _END64_LOCATOR.size:
        end, count, length, start = _read_end64(store, path, tail, end)
        here, disk, first_disk = count, 0, 0
    if comment or disk or first_disk or here != count:
        raise InvalidHeader("a multi-part zip, or one with a comment", where=path)
    if start + length != end:
        raise InvalidHeader(f"the zip directory ends at byte {start + length}, expected byte {end}", where=path)
    return start, count, length


def _read_end64(store: Source, path: str, tail: bytes, end: int) -> tuple[int, int, int, int]:
    _, disk, position, disks = _END64_LOCATOR.unpack(tail[: _END64_LOCATOR.size])
    if disk or disks != 1 or position + _END64.size + _END64_LOCATOR.size != end:
        raise InvalidHeader("the zip64 end record is not where its locator says", where=path)
    fields = _END64.unpack(store.read(path, position, _END64.size))
    magic, size, _, _, disk, first_disk, here, count, length, start = fields
    if magic != b"PK\x06\x06" or size != _END64.size - 12 or disk or first_disk or here != count:
        raise InvalidHeader("the zip64 end record is damaged", where=path)
    narrow = _END.unpack(tail[-_END.size :])
    for wide, short, full in ((count, narrow[4], _FULL16), (length, narrow[5], _FULL32), (start, narrow[6], _FULL32)):
        if short not in (wide, full):
            raise InvalidHeader("the two end records of the zip contradict each other", where=path)
    return position, count, length, start


def _read_centrals(directory: bytes, count: int, where: str) -> list[_Central]:
    found: list[_Central] = []
    position = 0
    while position < len(directory):
        if len(directory) - position < _CENTRAL.size or directory[position : position + 4] != b"PK\x01\x02":
            raise InvalidHeader("the zip directory is damaged", where=where)
        fields = _CENTRAL.unpack_from(directory, position)
        name_nbytes, extra_nbytes, comment_nbytes = fields[10:13]
        name_start = position + _CENTRAL.size
        extra_start = name_start + name_nbytes
        position = extra_start + extra_nbytes + comment_nbytes
        if position > len(directory):
            raise InvalidHeader("the zip directory is damaged", where=where)
        name = directory[name_start:extra_start]
        extra = directory[extra_start : extra_start + extra_nbytes]
        found.append(_central(name, fields, extra, where))
    if len(found) != count:
        raise InvalidHeader(f"the zip directory lists {len(found)} records, its end record {count}", where=where)
    return found


def _central(name: bytes, fields: tuple[int, ...], extra: bytes, where: str) -> _Central:
    flags, method, crc32 = fields[3], fields[4], fields[7]
    compressed, nbytes, disk, local = fields[8], fields[9], fields[13], fields[16]
    shown = show(name.decode("utf-8", "backslashreplace"))
    if method or flags & ~(_DESCRIPTOR_FOLLOWS | _UTF8):
        raise InvalidHeader(
            f'record "{shown}" is compressed or encrypted, which torch.save never does',
            where=where,
            hint="load it where it was made and save it again with torch.save, or as safetensors",
        )
    wide = _zip64_field(extra)
    values = []
    for value in (nbytes, compressed, local):
        if value == _FULL32 and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]  # noqa: PLW2901
        values.append(value)
    nbytes, compressed, local = values
    if disk or compressed != nbytes:
        raise InvalidHeader(f'record "{shown}" states two sizes, {compressed} and {nbytes}', where=where)
    return _Central(name, flags, crc32, nbytes, local)


def _zip64_field(extra: bytes) -> bytes:
    """The zip64 part of an extra field, or nothing."""
    position = 0
    while len(extra) - position >= 4:
        kind, nbytes = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            return extra[position + 4 : position + 4 + nbytes]
        position += 4 + nbytes
    return b""


def _checked_names(names: list[bytes], where: str, *, has_folder: bool) -> list[str]:
    """The names without the one folder in which all of them lie, where they lie in one."""
    found: dict[str, None] = {}
    tops: set[str] = set()
    for raw in names:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidHeader("a record's name is not UTF-8", where=where) from error
        parts = name.split("/")
        is_unsafe = any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name
        if is_unsafe or (len(parts) < 2) is has_folder:
            raise InvalidHeader(f'"{show(name)}" is not a valid record name', where=where)
        tops.add(parts[0] if has_folder else "")
        below = "/".join(parts[1:]) if has_folder else name
        if below in found:
            raise InvalidHeader(f'record "{show(below)}" appears twice in the directory', where=where)
        found[below] = None
    if len(tops) > 1:
        raise InvalidHeader("records lie in several folders", where=where)
    return list(found)


def _read_local(store: Source, path: str, name: str, central: _Central, end: int) -> Record:
    """The record of a directory entry, whose bytes must end before byte `end`."""
    header_end = central.local + _LOCAL.size + len(central.name)
    if header_end > end:
        raise TruncatedFile(
            f'record "{show(name)}" begins at byte {central.local}, its space ends at {end}', where=path
        )
    header = store.read(path, central.local, _LOCAL.size + len(central.name))
    fields = _LOCAL.unpack_from(header)
    magic, flags, method, crc32, compressed, nbytes = fields[0], fields[2], fields[3], *fields[6:9]
    if magic != b"PK\x03\x04" or header[_LOCAL.size :] != central.name or method or flags != central.flags:
        raise InvalidHeader(f'record "{show(name)}": its header contradicts the directory', where=path)
    if not _agrees((crc32, compressed, nbytes), central):
        raise InvalidHeader(f'record "{show(name)}": its size or CRC-32 contradicts the directory', where=path)
    offset = header_end + fields[10]
    if offset + central.nbytes > end:
        raise TruncatedFile(
            f'record "{show(name)}" ends at byte {offset + central.nbytes}, its space at byte {end}', where=path
        )
    return Record(name, offset, central.nbytes, central.crc32)


def _agrees(local: tuple[int, int, int], central: _Central) -> bool:
    if central.flags & _DESCRIPTOR_FOLLOWS and not any(local):
        return True
    crc32, compressed, nbytes = local
    sizes = {compressed, nbytes}
    return crc32 == central.crc32 and (sizes == {central.nbytes} or sizes == {_FULL32})
