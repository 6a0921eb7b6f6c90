"""Records of an unfinished run: names of its own objects, and the state of its uploads.

Every object of a run carries the word of that run, so that a run recognizes its own and those of earlier ones:
`.loraformat-WORD-upload-NAME`, `-file-NAME`, `-new-NAME`, `-alive-NAME` and `-output`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loraformat import strict_json
from loraformat.errors import InvalidJson, StorageError
from loraformat.storage.local.store import OWN_PREFIX

LOCK = f"{OWN_PREFIX}lock"
UPLOAD, FILE, NEW, ALIVE, OUTPUT = "upload", "file", "new", "alive", "output"
MOST_NBYTES = 16 << 20
_OWN = re.compile(
    rf"{re.escape(OWN_PREFIX)}([0-9a-f]{{16}})-({UPLOAD}|{FILE}|{NEW}|{ALIVE}|{OUTPUT})(?:-(.*))?", re.DOTALL
)
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def own_name(word: str, kind: str, name: str = "") -> str:
    """The name of an object that a run keeps for itself."""
    return f"{OWN_PREFIX}{word}-{kind}-{name}" if name else f"{OWN_PREFIX}{word}-{kind}"


def parsed_name(name: str) -> tuple[str, str, str] | None:
    """(word, kind, name of the file) of an object that a run keeps for itself; None for all others."""
    found = _OWN.fullmatch(name)
    return (found[1], found[2], found[3] or "") if found else None


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the store has.

    Attributes:
        crc32: as the store gave it back; "" where it does not.
    """

    number: int
    etag: str
    nbytes: int
    crc32: str = ""


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """What is known of the upload of one file.

    Attributes:
        upload: the id that the store gave it; "" as long as it is not known.
        nbytes: of the file.
        parts: all parts, in order, once they are there.
        made: the ETag of the object, once it was made and where it is not the one that AWS documents.
    """

    upload: str = ""
    nbytes: int = 0
    parts: tuple[SentPart, ...] = ()
    made: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether all parts are there."""
        return bool(self.parts)

    @property
    def etag(self) -> str:
        """The ETag that the object has or will have; "" where ETags of parts are not what AWS documents."""
        return self.made or self.etag_of_parts

    @property
    def etag_of_parts(self) -> str:
        """The ETag that AWS documents for an object of these parts; "" where theirs are not MD5 sums."""
        found = [_MD5.fullmatch(part.etag) for part in self.parts]
        if not found or None in found:
            return ""
        joined = b"".join(bytes.fromhex(one[1]) for one in found if one is not None)
        return f'"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(found)}"'

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        parts = [[part.number, part.etag, part.nbytes, part.crc32] for part in self.parts]
        return json.dumps({"upload": self.upload, "nbytes": self.nbytes, "parts": parts, "made": self.made}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> UploadRecord:
        """A record from what `to_bytes` gave. Raises: StorageError: it is not one."""
        value = _parsed(data, where)
        parts = value.get("parts")
        try:
            found = tuple(SentPart(*_typed(part)) for part in (parts if isinstance(parts, list) else ()))
        except (TypeError, ValueError):
            raise StorageError("not a record of an upload", where=where) from None
        upload, nbytes, made = value.get("upload"), value.get("nbytes"), value.get("made", "")
        if not isinstance(upload, str) or type(nbytes) is not int or not isinstance(made, str):
            raise StorageError("not a record of an upload", where=where)
        if found and sum(part.nbytes for part in found) != nbytes:
            raise StorageError("not a record of an upload: its parts are not the whole file", where=where)
        return cls(upload, nbytes, found, made)


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """What is known of an unfinished output.

    Attributes:
        is_shared: whether several processes write it.
        replaces: whether there are old files, so that new ones wait under names of their own.
        old: names of the old files.
        files: name → ETag, of all files, once they are being put in place.
        last: the file that is put in place after all others.
    """

    is_shared: bool = False
    replaces: bool = False
    old: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    last: str = ""

    def published(self, files: dict[str, str], last: str) -> OutputRecord:
        """The record of an output whose files are being put in place."""
        return replace(self, files=files, last=last)

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return json.dumps({**asdict(self), "old": list(self.old)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> OutputRecord:
        """A record from what `to_bytes` gave. Raises: StorageError: it is not one."""
        value = _parsed(data, where)
        old, files, last = value.get("old"), value.get("files"), value.get("last")
        if not isinstance(old, list) or not isinstance(files, dict) or not isinstance(last, str):
            raise StorageError("not a record of an output", where=where)
        if not all(isinstance(one, str) for one in [*old, *files, *files.values()]):
            raise StorageError("not a record of an output", where=where)
        flags = (value.get("is_shared") is True, value.get("replaces") is True)
        return cls(*flags, tuple(old), dict(files), last)


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = strict_json.parse(data, where, limit=MOST_NBYTES)
    except InvalidJson as error:
        raise StorageError(f"a damaged record of an unfinished output: {error.message}", where=where) from error
    if not isinstance(value, dict):
        raise StorageError("a damaged record of an unfinished output", where=where)
    return dict(value)


def _typed(part: object) -> tuple[int, str, int, str]:
    if not isinstance(part, list):
        raise TypeError(part)
    number, etag, nbytes, crc32 = part
    if type(number) is not int or type(nbytes) is not int or not isinstance(etag, str) or not isinstance(crc32, str):
        raise TypeError(part)
    return number, etag, nbytes, crc32
