"""A toy object store: parts in order, no rename, no reading of what is not complete, copies inside the store."""

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

    def scheme(self) -> Scheme:
        return Scheme(lambda uri: ObjectStore(self, uri), self.stage)

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
    ) -> Iterator[ObjectOutput]:
        del resume, names, written, permissions, on_cleared
        if target in inputs or (self.folder(target) and not overwrite):
            raise StorageError("the output exists already", where=target)
        output = ObjectOutput(self, target)
        try:
            yield output
        except BaseException:
            for name in output.complete:
                del self.objects[f"{target}/{name}"]
            raise
        for name in sorted(output.waiting, key=lambda name: (name == "loraformat.manifest.json", name)):
            if not name.startswith(".loraformat-"):
                self.objects[f"{target}/{name}"] = output.waiting[name]
                self.log.append(("put", f"{target}/{name}", len(output.waiting[name])))


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

    def __init__(self, bucket: Bucket, uri: str) -> None:
        super().__init__(bucket, uri)
        self.waiting: dict[str, bytes] = {}
        self.complete: set[str] = set()

    permissions = 0o777

    @property
    def location(self) -> str:
        return self.uri

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[Upload]:  # type: ignore[override]
        is_large = path.endswith((".safetensors", ".bin", ".toy"))
        upload = Upload(self.bucket, f"{self.uri}/{path}", copies, logs=is_large)
        yield upload
        data = upload.finish(size)
        if is_large:
            self.bucket.objects[f"{self.uri}/{path}"] = data
            self.complete.add(path)
        else:
            self.waiting[path] = data

    def names(self) -> list[str]:
        return sorted(self._contents())

    def is_own(self, path: str) -> bool:
        return path in self._contents()

    def remove(self, path: str) -> None:
        self.waiting.pop(path, None)
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
        self._log("complete", 0)
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
