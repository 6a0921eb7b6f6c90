"""A toy object store: parts in order, no rename, no reading of what is not complete, copies inside the store.

Large files are uploads that nobody can read before they are complete, which `seal` does, or the end of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Source
from loraformat.storage.schemes import Scheme

PART_NBYTES = 4096


@dataclass
class Bucket:
    """Objects by key, and what was asked of it: ("part", key, bytes), ("copy", key, bytes), ("complete", key, 0) ..."""

    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    unfinished: dict[str, ObjectOutput] = field(default_factory=dict)  # by "target#word"

    def scheme(self) -> Scheme:
        return Scheme(self.open, self.stage, join=self.join)

    def open(self, uri: str) -> ObjectStore:
        return self.unfinished[uri] if uri in self.unfinished else ObjectStore(self, uri)

    def put_folder(self, uri: str, files: Mapping[str, bytes]) -> None:
        self.objects |= {f"{uri}/{name}": data for name, data in files.items()}

    def folder(self, uri: str) -> dict[str, bytes]:
        return {key.removeprefix(f"{uri}/"): data for key, data in self.objects.items() if key.startswith(f"{uri}/")}

    @contextmanager
    def stage(
        self,
        target: str,
        *,
        overwrite: bool,
        inputs: Sequence[str] = (),
        resume: bool = False,
        names: Collection[str] = (),
        written: Callable[[str], Collection[str]] | None = None,
        permissions: int = 0o777,
        on_cleared: Callable[[int], None] | None = None,
        word: str | None = None,
    ) -> Iterator[ObjectOutput]:
        del resume, names, written, permissions, on_cleared
        self._refuse(target, inputs, overwrite=overwrite)
        location = f"{target}#{word or 'alone'}"
        if word is not None and location not in self.unfinished:
            raise StorageError("no such unfinished output", where=target)
        output = self.unfinished.setdefault(location, ObjectOutput(self, target, location))
        try:
            yield output
        except BaseException:
            output.unseal()
            if word is None:
                del self.unfinished[location]
            raise
        output.seal(set(output.uploads))
        for left in [left for left in self.unfinished if left.startswith(f"{target}#")]:
            del self.unfinished[left]
        for name in sorted(output.waiting, key=lambda name: (name == "loraformat.manifest.json", name)):
            if not name.startswith(".loraformat-"):
                self.objects[f"{target}/{name}"] = output.waiting[name]
                self.log.append(("put", f"{target}/{name}", len(output.waiting[name])))

    @contextmanager
    def join(
        self,
        target: str,
        word: str,
        *,
        overwrite: bool,
        inputs: Sequence[str] = (),
        names: Collection[str] = (),
        written: Callable[[str], Collection[str]] | None = None,
        permissions: int = 0o777,
    ) -> Iterator[ObjectOutput]:
        del names, written, permissions
        self._refuse(target, inputs, overwrite=overwrite)
        location = f"{target}#{word}"
        yield self.unfinished.setdefault(location, ObjectOutput(self, target, location))

    def _refuse(self, target: str, inputs: Sequence[str], *, overwrite: bool) -> None:
        if target in inputs or (self.folder(target) and not overwrite):
            raise StorageError("the output exists already", where=target)


class ObjectStore:
    """The objects under one prefix."""

    is_single_file = False

    def __init__(self, bucket: Bucket, uri: str) -> None:
        self.bucket, self.uri = bucket, uri
        if not bucket.folder(uri) and type(self) is ObjectStore:
            raise StorageError("no such objects", where=uri)

    def files(self) -> Mapping[str, int]:
        found = {name: len(data) for name, data in self._contents().items() if "/" not in name}
        return {name: nbytes for name, nbytes in sorted(found.items()) if not name.startswith(".loraformat-")}

    def folders(self) -> tuple[str, ...]:
        return ()

    def size(self, path: str) -> int:
        return len(self.read(path))

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        contents = self._contents()
        if path not in contents:
            raise StorageError("no such object", where=f"{self.uri}/{path}")
        stop = len(contents[path]) if nbytes is None else offset + nbytes
        return contents[path][offset:stop]

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self.read(path, offset, view.nbytes)

    def identity(self, path: str) -> tuple[str | int, ...]:
        return (path, self.size(path))

    def check_inside(self, path: str) -> None:
        pass

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> object:
        raise StorageError("read only", where=self.uri)

    def _contents(self) -> dict[str, bytes]:
        return self.bucket.folder(self.uri)


class ObjectOutput(ObjectStore):
    """An output: large files in parts, complete at once; small ones wait for the end, the manifest the longest."""

    permissions = 0o777
    reads_copies = True
    refused = ""

    def __init__(self, bucket: Bucket, uri: str, location: str) -> None:
        super().__init__(bucket, uri)
        self.location = location
        self.waiting: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.complete: set[str] = set()

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[Upload]:  # type: ignore[override]
        is_large = path.endswith((".safetensors", ".bin", ".toy"))
        upload = Upload(self.bucket, f"{self.uri}/{path}", copies, logs=is_large)
        yield upload
        data = upload.finish(size)
        (self.uploads if is_large else self.waiting)[path] = data

    def seal(self, names: Collection[str]) -> None:
        for name in names:
            self.bucket.objects[f"{self.uri}/{name}"] = self.uploads[name]
            self.bucket.log.append(("complete", f"{self.uri}/{name}", 0))
            self.complete.add(name)

    def unseal(self) -> None:
        for name in self.complete:
            del self.bucket.objects[f"{self.uri}/{name}"]
        self.complete = set()

    def names(self) -> list[str]:
        return sorted({**self._contents(), **self.uploads})

    def proves(self, path: str) -> bool | None:
        return path in self.uploads

    def is_own(self, path: str) -> bool:
        return path in self.names()

    def remove(self, path: str) -> None:
        self.waiting.pop(path, None)
        self.uploads.pop(path, None)
        self.bucket.objects.pop(f"{self.uri}/{path}", None)

    def _contents(self) -> dict[str, bytes]:
        return {**self.bucket.folder(self.uri), **self.waiting}


class Upload:
    """A file in parts: pieces come in any order, parts are sent in the order of the file."""

    def __init__(self, bucket: Bucket, key: str, copies: Sequence[Copy], *, logs: bool) -> None:
        self.bucket, self.key, self.logs = bucket, key, logs
        self.cuts = {copy.offset for copy in copies} | {copy.offset + copy.nbytes for copy in copies}
        self.pieces: dict[int, bytes] = {}
        self.sent = bytearray()
        self.unsent = bytearray()
        self.position = 0
        self.lock = threading.Lock()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.write_at(self.position, data)
        self.position += memoryview(data).nbytes

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._add(offset, bytes(data))

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        if isinstance(source, ObjectStore) and source.bucket is self.bucket:
            assert offset in self.cuts or not self.cuts, "a copy that was not announced"
            self._log("copy", nbytes)
        self._add(offset, source.read(path, source_offset, nbytes))

    def clone_from(self, source: Source, path: str) -> bool:
        return False

    def finish(self, size: int | None) -> bytes:
        assert not self.pieces, "a gap in the file"
        self._send(len(self.unsent))
        assert size is None or len(self.sent) == size
        return bytes(self.sent)

    def _add(self, offset: int, data: bytes) -> None:
        with self.lock:
            self.pieces[offset] = data
            while (end := len(self.sent) + len(self.unsent)) in self.pieces:
                self.unsent += self.pieces.pop(end)
                if not self.unsent and not self.pieces:
                    break
            while len(self.unsent) >= PART_NBYTES:
                self._send(PART_NBYTES)

    def _send(self, nbytes: int) -> None:
        if nbytes:
            self.sent += self.unsent[:nbytes]
            del self.unsent[:nbytes]
            self._log("part", nbytes)

    def _log(self, what: str, nbytes: int) -> None:
        if self.logs:
            self.bucket.log.append((what, self.key, nbytes))
