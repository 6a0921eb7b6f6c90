"""An unfinished output under a prefix: large files as invisible uploads, small ones in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from loraformat.diagnostics import show
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.base import Copy
from loraformat.storage.faults import checked_name, checked_range, checked_total
from loraformat.storage.local.store import OWN_PREFIX
from loraformat.storage.memory import MemoryWriter
from loraformat.storage.s3.address import Address, location_of
from loraformat.storage.s3.client import Client, as_storage_error, suppress_conflict
from loraformat.storage.s3.records import FILE, NEW, UPLOAD, UploadRecord, own_name, parsed_name
from loraformat.storage.s3.requests import abort, complete, parts_of, put_object, remove
from loraformat.storage.s3.store import HEAD_NBYTES, Listed, fetch, head, listed
from loraformat.storage.s3.uploads import Upload, Workers

# Files up to this size wait in memory until the end, up to so many bytes of them.
_SMALL_NBYTES, _MOST_WAITING_NBYTES = 8 << 20, 48 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How an output is made.

    Attributes:
        client: the service.
        word: of the run, see `records`.
        replaces: whether old files stand where it will be: new ones are completed under names of their own first.
        is_shared: whether other processes write files of it too, so that nothing waits in the memory of this one.
        resumes: whether files of an earlier run are taken over.
        copies_base: whether the store can copy what the output is made from.
        workers: threads of all its uploads.
    """

    client: Client
    word: str
    replaces: bool
    is_shared: bool
    resumes: bool
    copies_base: bool
    workers: Workers = field(default_factory=Workers)


class S3Output:
    """See Output. `names` of files are those that the output will have; their keys may be others until then.

    Args:
        address: where the output will be.
        making: shared with its subfolders.
        permissions: kept for whoever asks; objects have no mode bits.
    """

    is_single_file = False

    def __init__(self, address: Address, making: Making, permissions: int) -> None:
        self.address, self.uri, self.making, self.permissions = address, address.uri, making, permissions
        self.waiting: dict[str, bytes] = {}
        self.uploaded: dict[str, UploadRecord] = {}
        self.completed: dict[str, Listed] = {}
        self.subfolders: dict[str, S3Output] = {}
        self._own: set[str] = set()
        self._heads: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        """See Output."""
        return location_of(self.address, self.making.word)

    @property
    def reads_copies(self) -> bool:
        """See Output."""
        return not self.making.copies_base

    @property
    def refused(self) -> str:
        """See Output."""
        return next(iter(self.making.workers.refused), "")

    def key(self, name: str) -> str:
        """Where a file is completed: under its own name, or beside the old file of that name."""
        return self.address.key(self._own_name(NEW, name) if self.making.replaces else name)

    def load(self) -> None:
        """Take over what other processes, or an earlier run of the same word, have uploaded."""
        found, _ = listed(self.making.client, self.address)
        for each in found:
            kind = parsed_name(each)
            if kind is None or kind[0] != self.making.word:
                continue
            if kind[1] == FILE:
                self._own.add(f"{OWN_PREFIX}{kind[2]}")
            elif kind[1] == UPLOAD and (record := self._record(kind[2])) is not None and record.is_complete:
                self.uploaded[kind[2]] = record

    # reading

    def files(self) -> Mapping[str, int]:
        """See Source."""
        sizes = {name: len(data) for name, data in self.waiting.items()}
        sizes |= {name: record.nbytes for name, record in self.uploaded.items()}
        return dict(sorted(sizes.items()))

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return tuple(sorted(self.subfolders))

    def size(self, path: str) -> int:
        """See Source."""
        found = self._found(path)
        return found.nbytes if isinstance(found, Listed) else len(found)

    def _found(self, path: str) -> bytes | Listed:
        """What is known of a file: its bytes, or where an object of it is (to be)."""
        name = checked_name(path, self.uri)
        if name in self.waiting:
            return self.waiting[name]
        if name in self._own:
            return self._read_own(name)
        record = self._upload_of(name)
        if record is None:
            raise StorageError("no such file", where=f"{self.uri}/{show(path)}")
        return self.completed.get(name) or Listed(record.nbytes, record.etag)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Source. What is uploaded is completed first."""
        size = self.size(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(f"{self.uri}/{show(path)}", size, offset, count)
        buffer = bytearray(count)
        self.read_into(path, offset, buffer)
        return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Source."""
        view = memoryview(buffer).cast("B")
        found = self._found(path)
        checked_range(f"{self.uri}/{show(path)}", self.size(path), offset, view.nbytes)
        if isinstance(found, bytes):
            view[:] = found[offset : offset + view.nbytes]
            return
        self.seal([path])
        known = self.completed[path]
        if offset + view.nbytes > HEAD_NBYTES:
            fetch(self.making.client, self.address.bucket, self.key(path), known, offset, view)
            return
        if path not in self._heads:
            head_of = bytearray(min(known.nbytes, HEAD_NBYTES))
            fetch(self.making.client, self.address.bucket, self.key(path), known, 0, memoryview(head_of))
            self._heads[path] = bytes(head_of)
        view[:] = self._heads[path][offset : offset + view.nbytes]

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source."""
        found, record = self._found(path), self.uploaded.get(path)
        if isinstance(found, bytes):
            return (len(found),)
        # An object that is made can have another ETag than its parts promise, but it is the same file.
        return tuple(found) if record is None or found.etag != record.etag else (found.nbytes, record.etag_of_parts)

    def check_inside(self, path: str) -> None:
        """See Source: there are no links."""

    def names(self) -> list[str]:
        """See Output."""
        return sorted({*self.waiting, *self.uploaded, *self._own})

    def is_own(self, path: str) -> bool:
        """See Output."""
        return path in self.waiting or path in self.uploaded

    def proves(self, path: str) -> bool:
        """See Output: whether the store still has every part, as it was recorded."""
        record = self.uploaded.get(path)
        if record is None:
            return False
        if path in self.completed:
            return True
        found = parts_of(self.making.client, self.address.bucket, self.key(path), record.upload)
        if found is not None:
            return found == [(part.number, part.etag, part.nbytes) for part in record.parts]
        made = head(self.making.client, self.address.bucket, self.key(path), self.uri)
        if made is None or not record.etag or made != Listed(record.nbytes, record.etag):
            return False
        self.completed[path] = made  # by a run that was killed before it could go on
        return True

    # writing

    @contextmanager
    def create(
        self, path: str, size: int | None = None, copies: Sequence[Copy] = ()
    ) -> Iterator[Upload | MemoryWriter]:
        """See Store."""
        name = checked_name(path, self.uri)
        where = f"{self.uri}/{show(name)}"
        if size is None or name.startswith(OWN_PREFIX) or (self._is_small(size) and not self.making.is_shared):
            buffer = MemoryWriter(size or 0)
            yield buffer
            checked_total(where, size, buffer.written)
            if name.startswith(OWN_PREFIX):
                self._write_own(name, bytes(buffer.data))
            else:
                self.remove(name)
                self.waiting[name] = bytes(buffer.data)
            return
        self.remove(name)
        self._announce(name)
        upload = Upload(self.making.client, self.address.bucket, self.key(name), size, copies, self.making.workers)
        try:
            yield upload
            record = upload.finish()
        except BaseException:
            with suppress(LoraFormatError):
                upload.abandon()
            raise
        self._record_upload(name, record)
        self.uploaded[name] = record

    def _is_small(self, size: int) -> bool:
        return size <= _SMALL_NBYTES and size + sum(map(len, self.waiting.values())) <= _MOST_WAITING_NBYTES

    def seal(self, names: Collection[str]) -> None:
        """See Output."""
        left = [name for name in names if name not in self.waiting and name not in self.completed]
        for _ in self.making.workers.copiers.map(self._complete, left):
            pass

    def _complete(self, name: str) -> None:
        record = self._upload_of(name)
        if record is None:
            raise StorageError("no process has written this file", where=f"{self.uri}/{show(name)}")
        is_new = not self.making.replaces
        made = complete(self.making.client, self.address.bucket, self.key(name), record, is_new=is_new)
        self.completed[name] = made
        if made.etag != record.etag:
            self.uploaded[name] = replace(record, made=made.etag)
            self._record_upload(name, self.uploaded[name])

    def _upload_of(self, name: str) -> UploadRecord | None:
        """What is known of an upload, of this process or of another one."""
        if name not in self.uploaded:
            record = self._record(name)
            if record is None or not record.is_complete:
                return None
            self.uploaded[name] = record
        return self.uploaded[name]

    def remove(self, path: str) -> None:
        """See Output."""
        client, bucket = self.making.client, self.address.bucket
        self.waiting.pop(path, None)
        self._heads.pop(path, None)
        if path in self._own:
            self._own.discard(path)
            remove(client, bucket, [self._own_key(FILE, _short(path))])
        record, completed = self.uploaded.pop(path, None), self.completed.pop(path, None)
        if completed is not None:
            remove(client, bucket, [self.key(path)])
        elif record is not None:
            abort(client, bucket, self.key(path), record.upload)
            made = head(client, bucket, self.key(path), self.uri)
            if record.etag and made == Listed(record.nbytes, record.etag):  # an earlier run had completed it
                remove(client, bucket, [self.key(path)])
        if record is not None:
            remove(client, bucket, [self._own_key(UPLOAD, path)])

    @contextmanager
    def subfolder(self, name: str) -> Iterator[S3Output]:
        """See Output."""
        checked_name(name, self.uri)
        if name not in self.subfolders:
            self.subfolders[name] = S3Output(self.address.below(name), self.making, self.permissions)
            if self.making.resumes:
                self.subfolders[name].load()
        yield self.subfolders[name]

    def below(self, name: str) -> S3Output:
        """A subfolder, for reading. Raises: StorageError: there is none."""
        if name not in self.subfolders:
            raise StorageError("no such folder", where=f"{self.uri}/{show(name)}")
        return self.subfolders[name]

    def remove_folder(self, name: str) -> None:
        """See Output."""
        folder = self.subfolders.pop(name)
        for each in folder.names():
            folder.remove(each)

    def nbytes(self) -> int:
        """See Output."""
        return sum(self.files().values()) + sum(folder.nbytes() for folder in self.subfolders.values())

    # own objects

    def _own_name(self, kind: str, name: str) -> str:
        return own_name(self.making.word, kind, name)

    def _own_key(self, kind: str, name: str) -> str:
        return self.address.key(self._own_name(kind, name))

    def _write_own(self, name: str, data: bytes) -> None:
        with as_storage_error(f"{self.uri}/{show(name)}"):
            put_object(self.making.client, self.address.bucket, self._own_key(FILE, _short(name)), data)
        self._own.add(name)

    def _read_own(self, name: str) -> bytes:
        return self._object(self._own_key(FILE, _short(name)), f"{self.uri}/{show(name)}") or b""

    def _announce(self, name: str) -> None:
        """Say that an upload of this file may be there: the answer to the request that begins it can be lost."""
        data, key = UploadRecord().to_bytes(), self._own_key(UPLOAD, name)
        with as_storage_error(self.uri), suppress_conflict():
            put_object(self.making.client, self.address.bucket, key, data, IfNoneMatch="*")

    def _record_upload(self, name: str, record: UploadRecord) -> None:
        with as_storage_error(self.uri):
            put_object(self.making.client, self.address.bucket, self._own_key(UPLOAD, name), record.to_bytes())

    def _record(self, name: str) -> UploadRecord | None:
        data = self._object(self._own_key(UPLOAD, name), self.uri)
        return None if data is None else UploadRecord.from_bytes(data, f"{self.uri}/{show(name)}")

    def _object(self, key: str, where: str) -> bytes | None:
        found = head(self.making.client, self.address.bucket, key, where)
        if found is None:
            return None
        data = bytearray(found.nbytes)
        fetch(self.making.client, self.address.bucket, key, found, 0, memoryview(data))
        return bytes(data)


def _short(name: str) -> str:
    return name.removeprefix(OWN_PREFIX)
