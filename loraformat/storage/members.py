"""Byte ranges inside files as the files of a virtual folder, read in place."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.errors import StorageError
from loraformat.storage.base import Source
from loraformat.storage.faults import checked_range


class MemberStore:
    """See Source.

    Args:
        source: what has the files.
        members: name → (file, first byte, bytes), each inside its file.
    """

    is_single_file = False

    def __init__(self, source: Source, members: Mapping[str, tuple[str, int, int]]) -> None:
        self.uri = source.uri
        self._source, self._members = source, dict(members)

    def files(self) -> Mapping[str, int]:
        """See Source."""
        return {name: nbytes for name, (_, _, nbytes) in sorted(self._members.items())}

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return ()

    def size(self, path: str) -> int:
        """See Source."""
        return self._member(path)[2]

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Source."""
        file, start, size = self._member(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(path, size, offset, count)
        return self._source.read(file, start + offset, count)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Source."""
        file, start, size = self._member(path)
        checked_range(path, size, offset, memoryview(buffer).nbytes)
        self._source.read_into(file, start + offset, buffer)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: that of the file, and the place in it."""
        file, start, _ = self._member(path)
        return (*self._source.identity(file), start)

    def check_inside(self, path: str) -> None:
        """See Source."""
        self._source.check_inside(self._member(path)[0])

    def _member(self, path: str) -> tuple[str, int, int]:
        if path not in self._members:
            raise StorageError("no such file or folder", where=path)
        return self._members[path]
