"""A store that is a dict: for tests, and for everything that needs no disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Source
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.faults import checked_name, checked_range, checked_total


class MemoryStore:
    """Files in memory. It cannot be opened again by its URI."""

    def __init__(self, contents: Mapping[str, bytes] | None = None, uri: str = "memory:") -> None:
        self.uri = uri
        self._contents = {checked_name(name, uri): bytes(data) for name, data in (contents or {}).items()}

    def files(self) -> Mapping[str, int]:
        """Files by name → size in bytes, sorted."""
        return {name: len(data) for name, data in sorted(self._contents.items())}

    def folders(self) -> tuple[str, ...]:
        """See Store."""
        return ()

    def size(self, path: str) -> int:
        """See Store."""
        return len(self._content(path))

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Store."""
        data = self._content(path)
        count = len(data) - offset if nbytes is None else nbytes
        checked_range(path, len(data), offset, count)
        return data[offset : offset + count]

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Store."""
        view = memoryview(buffer).cast("B")
        data = self._content(path)
        checked_range(path, len(data), offset, view.nbytes)
        view[:] = data[offset : offset + view.nbytes]

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[MemoryWriter]:
        """See Store."""
        del copies
        name = checked_name(path, self.uri)
        writer = MemoryWriter(size or 0)
        yield writer
        checked_total(name, size, writer.written)
        self._contents[name] = bytes(writer.data)

    is_single_file = False

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: a digest of the content."""
        import hashlib

        return (hashlib.sha256(self._content(path)).hexdigest(),)

    def check_inside(self, path: str) -> None:
        """See Source: there are no links."""

    def _content(self, path: str) -> bytes:
        found = self._contents.get(checked_name(path, self.uri))
        if found is None:
            raise StorageError("no such file or folder", where=path)
        return found


class MemoryWriter:
    """See Writer."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.written = 0
        self._position = 0
        self._lock = threading.Lock()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        self.write_at(self._position, data)
        self._position += memoryview(data).nbytes

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        view = memoryview(data).cast("B")
        with self._lock:
            missing = offset + view.nbytes - len(self.data)
            if missing > 0:
                self.data.extend(bytes(missing))
            self.data[offset : offset + view.nbytes] = view
            self.written += view.nbytes

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """See Writer."""
        copy_blocks(self, source, path, source_offset, offset, nbytes)

    def clone_from(self, source: Source, path: str) -> bool:
        """See Writer: nothing is shared."""
        del source, path
        return False
