"""The objects under a prefix as the files of a folder, or one object as a single file. Read only."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, NamedTuple

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Writer
from loraformat.storage.faults import checked_name, checked_range
from loraformat.storage.local.store import OWN_PREFIX
from loraformat.storage.s3.address import Address, parsed
from loraformat.storage.s3.client import Client, as_storage_error, connected, is_absent, is_cut

HEAD_NBYTES = 128 << 10  # of a safetensors file: the header of nearly all shards lies in it
_BODY_ATTEMPTS = 6
_PAUSE_S = 0.1  # before a body is asked for again; twice as long each time
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_BLOCK_NBYTES = 1 << 20
# Seconds for an answer, and for its length so many bytes a second.
_PATIENCE_S, _LEAST_RATE = 40, 100_000
_MOST_LISTED = 100_000


class Listed(NamedTuple):
    """An object as a list or a HEAD has it."""

    nbytes: int
    etag: str


def open_prefix(uri: str) -> S3Store:
    """The files at an address. Raises: StorageError: there are none, or they cannot be read."""
    return S3Store(parsed(uri))


class S3Store:
    """The objects below one prefix, down to the next slash, or one object alone as a store with one entry.

    Objects are listed once; each is read under the ETag that it had then, so that one which is replaced in between is
    an error. Every answer is compared with what was asked for: status, range, size, length of the body. A body that
    breaks off is asked for again from there.

    Args:
        address: of a folder or of one object.
        client: None for the one of this process.

    Raises: StorageError: there is nothing, or no access.
    """

    def __init__(self, address: Address, client: Client | None = None) -> None:
        self.address, self.uri = address, address.uri
        self.client = client or connected()
        self._heads: dict[str, bytes] = {}
        self._objects, self._folders = listed(self.client, address)
        self._only: str | None = None
        if not self._objects and not self._folders:
            self._open_single()

    def _open_single(self) -> None:
        found = head(self.client, self.address.bucket, self.address.path, self.uri) if self.address.path else None
        if found is None:
            raise StorageError("no such prefix or object", where=self.uri)
        folder, _, self._only = self.address.path.rpartition("/")
        self.address = Address(self.address.bucket, folder)
        self._objects = {self._only: found}

    @property
    def is_single_file(self) -> bool:
        """See Source."""
        return self._only is not None

    def files(self) -> Mapping[str, int]:
        """See Source."""
        return {name: one.nbytes for name, one in self._objects.items() if not name.startswith(OWN_PREFIX)}

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return self._folders

    def size(self, path: str) -> int:
        """See Source."""
        return self.listed(path).nbytes

    def listed(self, path: str) -> Listed:
        """An object as it was when this store was opened. Raises: StorageError: there is none."""
        found = self._objects.get(checked_name(path, self.uri))
        if found is None:
            raise StorageError("no such file", where=f"{self.uri}/{show(path)}")
        return found

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Source."""
        size = self.size(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(self._where(path), size, offset, count)
        if offset + count <= min(size, HEAD_NBYTES):
            return self._head(path, min(size, HEAD_NBYTES))[offset : offset + count]
        buffer = bytearray(count)
        self._fill(path, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Source."""
        view = memoryview(buffer).cast("B")
        size = self.size(path)
        checked_range(self._where(path), size, offset, view.nbytes)
        if path in self._heads and offset + view.nbytes <= len(self._heads[path]):
            view[:] = self._heads[path][offset : offset + view.nbytes]
        else:
            self._fill(path, offset, view)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: size and ETag."""
        return tuple(self.listed(path))

    def check_inside(self, path: str) -> None:
        """See Source: there are no links."""

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """Raises: StorageError, always: objects are made by a `stage`."""
        del size, copies
        raise StorageError("it was opened for reading only", where=self._where(path))

    def key(self, path: str) -> str:
        """The key of a file."""
        return self.address.key(path)

    def below(self, name: str) -> S3Store:
        """A subfolder. Raises: StorageError: there is none."""
        return S3Store(self.address.below(checked_name(name, self.uri)), self.client)

    def _where(self, path: str) -> str:
        return f"s3://{self.address.bucket}/{show(self.key(path))}"

    def _head(self, path: str, nbytes: int) -> bytes:
        if path not in self._heads:
            buffer = bytearray(nbytes)
            self._fill(path, 0, memoryview(buffer))
            self._heads[path] = bytes(buffer)
        return self._heads[path]

    def _fill(self, path: str, offset: int, view: memoryview) -> None:
        """Fill a buffer with a range that the object has."""
        fetch(self.client, self.address.bucket, self.key(path), self.listed(path), offset, view)


def fetch(client: Client, bucket: str, key: str, known: Listed, offset: int, view: memoryview) -> None:
    """Fill a buffer with bytes of an object, which must be the one that is known.

    Raises: StorageError: it is another one by now, the answer is not the one asked for, breaks off every time, or is
        too slow.
    """
    where = f"s3://{bucket}/{show(key)}"
    deadline = time.monotonic() + _PATIENCE_S + view.nbytes / _LEAST_RATE
    done, idle = 0, 0
    with as_storage_error(where):
        while done < view.nbytes:
            start, last = offset + done, offset + view.nbytes - 1
            answer = client.quick.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{last}", IfMatch=known.etag)
            with closing(answer["Body"]) as body:
                _check_answer(answer, known, start, last)
                came = _received(body, view[done:], deadline)
            done += came
            if done == view.nbytes:
                return
            idle = 0 if came > _BLOCK_NBYTES else idle + 1
            if idle >= _BODY_ATTEMPTS or time.monotonic() > deadline:
                text = f"the answer was too slow or broke off, last at byte {offset + done} of {known.nbytes}"
                raise StorageError(text, hint="try again later")
            time.sleep(_PAUSE_S * 2**idle)


def _received(body: Any, view: memoryview, deadline: float) -> int:  # noqa: ANN401 - botocore's
    """Fill a buffer from one body; how many bytes came before it ended or broke off."""
    raw = getattr(body, "_raw_stream", body)
    read = getattr(raw, "read1", None) or raw.read  # without waiting for all that is asked for, where urllib3 can
    done = 0
    try:
        while done < view.nbytes:
            data = read(min(_BLOCK_NBYTES, view.nbytes - done))
            view[done : done + len(data)] = data
            done += len(data)
            if not data:
                break
            if time.monotonic() > deadline:
                break
    except Exception as error:
        if not is_cut(error):
            raise
    return done


def _check_answer(answer: Mapping[str, Any], known: Listed, start: int, last: int) -> None:
    """Raises: StorageError: the answer holds other bytes than those that were asked for."""
    if answer.get("ETag", known.etag) != known.etag:
        raise StorageError("the object changed while it was in use: another ETag")
    wanted = f"bytes {start}-{last}/{known.nbytes}"
    stated = str(answer.get("ContentRange", ""))
    if not stated and (start, last) == (0, known.nbytes - 1) and answer.get("ContentLength") == known.nbytes:
        return
    found = _RANGE.fullmatch(stated)
    if found is None or stated != wanted or answer.get("ContentLength") != last - start + 1:
        said = show(stated, 80) or f"{answer.get('ContentLength')} bytes without a range"
        raise StorageError(f"{wanted} were requested, but the server sent {said}: it does not support range requests")


def head(client: Client, bucket: str, key: str, where: str) -> Listed | None:
    """An object by its key; None where there is none."""
    with as_storage_error(where):
        try:
            found = client.quick.head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if is_absent(error):
                return None
            raise
        return Listed(int(found["ContentLength"]), str(found["ETag"]))


def listed(client: Client, address: Address) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """The objects of a folder by name, and the names of its subfolders; sorted.

    Raises: StorageError: no such bucket, no access, or more objects than a model has.
    """
    objects: dict[str, Listed] = {}
    folders: list[str] = []
    prefix = address.prefix
    with as_storage_error(address.uri):
        pages = client.quick.get_paginator("list_objects_v2").paginate(
            Bucket=address.bucket, Prefix=prefix, Delimiter="/"
        )
        for page in pages:
            for each in page.get("Contents", ()):
                name = str(each["Key"]).removeprefix(prefix)
                if name:  # a marker of the folder itself has none
                    objects[name] = Listed(int(each["Size"]), str(each["ETag"]))
            folders += [str(each["Prefix"])[len(prefix) : -1] for each in page.get("CommonPrefixes", ())]
            if len(objects) + len(folders) > _MOST_LISTED:
                raise StorageError(f"more than {_MOST_LISTED} objects in one folder", where=address.uri)
    shown = [name for name in folders if name and not name.startswith(".")]
    return dict(sorted(objects.items())), tuple(sorted(shown))
