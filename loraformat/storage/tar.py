"""The members of a plain tar archive as the files of a folder, read in place without unpacking.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraformat.diagnostics import show
from loraformat.errors import InvalidHeader, TruncatedFile
from loraformat.storage.base import Source
from loraformat.storage.members import MemberStore

_BLOCK = 512
_MOST_MEMBERS = 10_000
_MOST_EXTENDED_NBYTES = 64 << 10
_GZIP = b"\x1f\x8b"
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_LONG_NAME, _EXTENDED, _GLOBAL = b"L", b"x", b"g"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    kind: bytes
    start: int
    nbytes: int


class TarStore(MemberStore):
    """See Source. Members in folders of the archive cannot be reached; the names of those folders are listed.

    Raises, when made:
        InvalidHeader (LF003): not a tar archive, a compressed one, or one with links, devices, or names that lead out.
        TruncatedFile (LF004): a member ends after the file does.
    """

    def __init__(self, archive: Source, path: str) -> None:
        members: dict[str, tuple[str, int, int]] = {}
        folders: set[str] = set()
        for member in _members_of(archive, path):
            parts = _checked_parts(member.name, path)
            if not parts:
                continue
            if len(parts) > 1 or member.kind == _FOLDER:
                folders.add(parts[0])
                continue
            if parts[0] in members:
                raise InvalidHeader(f"{show(parts[0], 200)} appears twice in the archive", where=path)
            members[parts[0]] = (path, member.start, member.nbytes)
        super().__init__(archive, members)
        self._folders = tuple(sorted(name for name in folders if not name.startswith(".")))

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return self._folders


def _members_of(archive: Source, path: str) -> Iterator[_Member]:
    """Regular files and folders in the order of the archive."""
    end, at, count = archive.size(path), 0, 0
    name, nbytes = "", -1
    while at + _BLOCK <= end:
        header = archive.read(path, at, _BLOCK)
        if not any(header):
            return
        kind, size = _kind_and_size(header, at, path)
        if kind not in (_EXTENDED, _GLOBAL, _LONG_NAME) and nbytes >= 0:
            size = nbytes
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if start + size > end:
            raise TruncatedFile(f"a member ends at byte {start + size}, but the archive at {end}", where=path)
        count += 1
        if count > _MOST_MEMBERS:
            raise InvalidHeader(f"more than {_MOST_MEMBERS} members", where=path)
        if kind in (_EXTENDED, _GLOBAL, _LONG_NAME):
            name, nbytes = _extended(archive, path, kind, start, size, (name, nbytes))
            continue
        yield _Member(name or _own_name(header), kind, start, size)
        name, nbytes = "", -1
    if count == 0:
        raise InvalidHeader("not a tar archive: it is shorter than one header", where=path)


def _kind_and_size(header: bytes, at: int, path: str) -> tuple[bytes, int]:
    if at == 0 and header.startswith(_GZIP):
        raise InvalidHeader("a compressed archive", where=path, hint="unpack it with tar -xzf and pass the folder")
    checksum = _octal(header[148:156])
    blank = header[:148] + b" " * 8 + header[156:]
    if checksum is None or checksum != sum(blank):
        text = "not a tar archive" if at == 0 else f"the header at byte {at} is damaged"
        raise InvalidHeader(f"{text}: its checksum is wrong", where=path)
    kind, size = header[156:157], _octal(header[124:136])
    if kind in _KINDS:
        raise InvalidHeader(f"{show(_own_name(header), 200)} is {_KINDS[kind]}: only files are expected", where=path)
    if kind not in (*_REGULAR, _FOLDER, _LONG_NAME, _EXTENDED, _GLOBAL):
        raise InvalidHeader(f"the member at byte {at} is of an unknown kind {kind!r}", where=path)
    if size is None:
        raise InvalidHeader(f"the header at byte {at} states no size", where=path)
    return kind, 0 if kind == _FOLDER else size


def _octal(field: bytes) -> int | None:
    """A number: octal digits, or GNU's big-endian binary after a set first bit."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    return int(text, 8) if text and not text.strip(b"01234567") else None


def _own_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _extended(
    archive: Source, path: str, kind: bytes, start: int, size: int, known: tuple[str, int]
) -> tuple[str, int]:
    """(name, size) that hold for the next member, -1 for "as its own header has it"."""
    if size > _MOST_EXTENDED_NBYTES:
        raise InvalidHeader(f"an extended header of {size} bytes: at most {_MOST_EXTENDED_NBYTES} are read", where=path)
    data = archive.read(path, start, size)
    if kind == _LONG_NAME:
        return data.rstrip(b"\0").decode("utf-8", "backslashreplace"), known[1]
    name, nbytes = known
    for key, value in _records(data, path):
        if key in (b"path", b"size") and kind == _GLOBAL:
            raise InvalidHeader("a global header sets the name or size of all members", where=path)
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise InvalidHeader("an extended header states no size", where=path)
            nbytes = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise InvalidHeader("a sparse member; only plain files are expected", where=path)
    return name, nbytes


def _records(data: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
    """The records "LENGTH KEY=VALUE" of an extended header, each with a line end."""
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 8].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        record = data[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not length or len(record) != length or not record.endswith(b"\n") or not equals:
            raise InvalidHeader("an extended header is damaged", where=path)
        yield key, value
        at += length


def _checked_parts(name: str, path: str) -> list[str]:
    """The components of a member's name. Raises InvalidHeader (LF003): it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise InvalidHeader(f"the name {show(name, 200)} leads out of the archive", where=path)
    return parts
