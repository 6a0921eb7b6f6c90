"""Parts of files while their bytes come in any order: a few in memory, the others in a temporary file."""

from __future__ import annotations

import tempfile
import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from loraformat.errors import StorageError
from loraformat.storage.faults import as_storage_error
from loraformat.storage.s3.parts import Part

if TYPE_CHECKING:
    from typing_extensions import Self


class PartBuffer:
    """The bytes of one part that is sent, but for those that are fetched when it is complete.

    Not for several threads at a time; see `Buffers`.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self._written: list[tuple[int, int]] = []  # ranges of the file, sorted, apart from each other
        self.missing = part.nbytes - sum(fill.nbytes for fill in part.fills)
        self.data: bytearray | None = None
        self.file: IO[bytes] | None = None

    def write(self, offset: int, view: memoryview) -> None:
        """Take bytes of the file from `offset` on; those that are fetched are left out."""
        for start, stop in self._wanted(offset, offset + view.nbytes):
            piece = view[start - offset : stop - offset]
            self._note(start, stop)
            self.missing -= piece.nbytes
            at = start - self.part.start
            if self.file is not None:
                self.file.seek(at)
                self.file.write(piece)
            else:
                if self.data is None:
                    self.data = bytearray(self.part.nbytes)
                self.data[at : at + piece.nbytes] = piece

    def _note(self, start: int, stop: int) -> None:
        """Raises: StorageError: bytes of this range came before."""
        index = bisect_left(self._written, (start, stop))
        before = self._written[index - 1] if index else (start, start)
        after = self._written[index] if index < len(self._written) else (stop, stop)
        if before[1] > start or after[0] < stop:
            raise StorageError("bytes of a file were written twice")
        joins_before, joins_after = bool(index) and before[1] == start, after[0] == stop and after[1] > stop
        low, high = before[0] if joins_before else start, after[1] if joins_after else stop
        self._written[index - joins_before : index + joins_after] = [(low, high)]

    def _wanted(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        start, stop = max(start, self.part.start), min(stop, self.part.stop)
        found = []
        for fill in self.part.fills:
            if fill.offset + fill.nbytes <= start:
                continue
            if fill.offset >= stop:
                break
            if start < fill.offset:
                found.append((start, fill.offset))
            start = fill.offset + fill.nbytes
        if start < stop:
            found.append((start, stop))
        return found

    def put_aside(self) -> None:
        """Move the bytes out of memory."""
        if self.data is not None and self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `take`
            self.file.truncate(self.part.nbytes)
            self.file.write(self.data)
            self.data = None

    def take(self) -> bytearray:
        """All bytes; nothing is kept here."""
        data, self.data = self.data, None
        if self.file is not None:
            with self.file as file:
                file.seek(0)
                data = bytearray(self.part.nbytes)
                if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                    raise StorageError("a temporary file lost its end")
            self.file = None
        return bytearray(self.part.nbytes) if data is None else data

    def close(self) -> None:
        """Let go of everything."""
        self.data = None
        if self.file is not None:
            self.file.close()
            self.file = None


class Buffers:
    """The open parts of all files of an output, of which at most so many are in memory.

    Args:
        most: parts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_memory: dict[int, PartBuffer] = {}
        self._lock = threading.Lock()

    def write(self, buffer: PartBuffer, offset: int, view: memoryview, where: str) -> bool:
        """Put bytes into a part; whether nothing is missing in it now.

        Raises: StorageError: bytes came twice, or the temporary file cannot be written.
        """
        with self._lock, as_storage_error(where):
            was_missing = buffer.missing
            buffer.write(offset, view)
            self._in_memory.pop(id(buffer), None)
            if buffer.missing == 0:
                return was_missing > 0
            if buffer.data is not None:
                self._in_memory[id(buffer)] = buffer
            while len(self._in_memory) > self._most:
                self._in_memory.pop(next(iter(self._in_memory))).put_aside()
            return False

    def forget(self, buffer: PartBuffer) -> None:
        """Let go of a part that is not wanted any more."""
        with self._lock:
            self._in_memory.pop(id(buffer), None)
            buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            for buffer in self._in_memory.values():
                buffer.close()
            self._in_memory.clear()
