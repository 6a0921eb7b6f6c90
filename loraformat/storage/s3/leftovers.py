"""Leftovers of unfinished runs at an output: found by their names, and removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.local.store import OWN_PREFIX
from loraformat.storage.s3.address import Address
from loraformat.storage.s3.client import Client, as_storage_error
from loraformat.storage.s3.records import (
    LOCK,
    NEW,
    OUTPUT,
    UPLOAD,
    OutputRecord,
    UploadRecord,
    own_name,
    parsed_name,
)
from loraformat.storage.s3.requests import abort, remove, uploads_below
from loraformat.storage.s3.store import Listed, fetch, head

_MOST_OBJECTS = 100_000


@dataclass(frozen=True, slots=True)
class Left:
    """The objects under a prefix, sorted out.

    Attributes:
        files: those that are seen: name below the prefix → what it is.
        own: word of a run to this very prefix → names below the prefix of the objects that it keeps.
        inner: objects of runs to prefixes below this one, which are theirs: locks, and notes about outputs.
    """

    files: dict[str, Listed] = field(default_factory=dict)
    own: dict[str, dict[str, Listed]] = field(default_factory=dict)
    inner: list[str] = field(default_factory=list)

    def uploaded(self, word: str) -> Iterable[tuple[str, str]]:
        """(name below the prefix, name of its record) of files of which a run has, or may have, uploads."""
        for path in self.own.get(word, {}):
            folder, name = _split(path)
            found = parsed_name(name)
            if found is not None and found[1] == UPLOAD:
                yield f"{folder}{found[2]}", path


def look(client: Client, address: Address) -> Left:
    """What is under a prefix, subfolders included. Raises: StorageError: it cannot be listed, or is too much."""
    left, prefix, count = Left(), address.prefix, 0
    with as_storage_error(address.uri):
        for page in client.quick.get_paginator("list_objects_v2").paginate(Bucket=address.bucket, Prefix=prefix):
            for each in page.get("Contents", ()):
                path = str(each["Key"]).removeprefix(prefix)
                folder, name = _split(path)
                known = Listed(int(each["Size"]), str(each["ETag"]))
                own = parsed_name(name)
                if folder and (name == LOCK or (own is not None and own[1] == OUTPUT)):
                    left.inner.append(path)
                elif own is not None:
                    left.own.setdefault(own[0], {})[path] = known
                elif name and not name.startswith(OWN_PREFIX):
                    left.files[path] = known
                count += 1
            if count > _MOST_OBJECTS:
                raise StorageError(
                    f"more than {_MOST_OBJECTS} objects, so it is not the output of a run", where=address.uri
                )
    # Runs that have folders note their output at the top.
    for word in [word for word, paths in left.own.items() if all(_split(path)[0] for path in paths)]:
        del left.own[word]
    return left


def refuse_inner(address: Address, left: Left) -> None:
    """Raises: StorageError: below a prefix lies an output that another run is making, or has left unfinished."""
    if left.inner:
        folder, name = _split(left.inner[0])
        text = (
            "in use by another run, or left unfinished by one"
            if name == LOCK
            else "an unfinished output of another run"
        )
        hint = f"finish that one, or remove {show(name, 60)} there; outputs cannot be nested"
        raise StorageError(text, where=address.below(folder.rstrip("/")).uri, hint=hint)


def record_of(client: Client, address: Address, left: Left, word: str) -> OutputRecord | None:
    """What a run noted about its output; None where it noted nothing, or nothing that can be read."""
    name = own_name(word, OUTPUT)
    known = left.own.get(word, {}).get(name)
    if known is None:
        return None
    with suppress(StorageError):
        return OutputRecord.from_bytes(_read(client, address, name, known), address.uri)
    return None


def unfinished_files(client: Client, address: Address, left: Left) -> dict[str, Listed]:
    """Files that are seen and belong to outputs that were never finished: names below the prefix."""
    found: dict[str, Listed] = {}
    for word in left.own:
        record = record_of(client, address, left, word)
        published = record.files if record is not None else {}
        if record is not None and record.last and _is_there(left, record.last, published):
            continue  # it was finished, and its run ended before it could clear up
        found |= {name: left.files[name] for name in published if _is_there(left, name, published)}
        for name, path in left.uploaded(word):
            if name in left.files and name not in found:
                with suppress(StorageError):
                    sent = UploadRecord.from_bytes(_read(client, address, path, left.own[word][path]), address.uri)
                    if sent.etag and left.files[name] == Listed(sent.nbytes, sent.etag):
                        found[name] = left.files[name]
    return found


def _is_there(left: Left, name: str, published: Mapping[str, str]) -> bool:
    return name in left.files and left.files[name].etag == published.get(name)


def clear(client: Client, address: Address, left: Left, words: Iterable[str]) -> None:
    """Remove what runs keep for themselves, and end their uploads."""
    chosen = [word for word in words if word in left.own]
    end_uploads(client, address, {address.key(name) for word in chosen for name in _uploaded_keys(left, word)})
    for word in chosen:
        # The note about the output goes last: without it, nobody knows whose the others are.
        paths = sorted(left.own[word], key=lambda path: path == own_name(word, OUTPUT))
        remove(client, address.bucket, [address.key(path) for path in paths])


def uploaded_nbytes(client: Client, address: Address, left: Left) -> int:
    """Bytes of the files that unfinished runs have uploaded."""
    return sum(
        _uploaded_nbytes(client, address, path, known) for own in left.own.values() for path, known in own.items()
    )


def _uploaded_nbytes(client: Client, address: Address, path: str, known: Listed) -> int:
    found = parsed_name(_split(path)[1])
    if found is None or found[1] != UPLOAD:
        return 0
    with suppress(LoraFormatError):
        return UploadRecord.from_bytes(_read(client, address, path, known), address.uri).nbytes
    return 0


def _uploaded_keys(left: Left, word: str) -> Iterable[str]:
    """Below the prefix, what uploads of a run may be for: the files, and what waits beside old ones."""
    for name, _ in left.uploaded(word):
        folder, last = _split(name)
        yield name
        yield f"{folder}{own_name(word, NEW, last)}"


def end_uploads(client: Client, address: Address, keys: Iterable[str], *, but: Iterable[str] = ()) -> None:
    """Abort all uploads for some keys, and those of nobody else.

    Args:
        but: ids that are left alone.
    """
    wanted, kept = set(keys), set(but)
    if not wanted:
        return
    for key, upload in uploads_below(client, address.bucket, address.prefix):
        if key in wanted and upload not in kept:
            abort(client, address.bucket, key, upload)


def remove_if_same(client: Client, address: Address, name: str, known: Listed) -> None:
    """Remove an object, if it is still the one that is known."""
    key = address.key(name)
    if head(client, address.bucket, key, address.uri) == known:
        remove(client, address.bucket, [key])


def _read(client: Client, address: Address, name: str, known: Listed) -> bytes:
    data = bytearray(known.nbytes)
    fetch(client, address.bucket, address.key(name), known, 0, memoryview(data))
    return bytes(data)


def _split(path: str) -> tuple[str, str]:
    """The folder of a name, with its slash, and the rest."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}", name
