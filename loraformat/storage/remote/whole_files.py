"""Small files of an adapter, fetched once instead of tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from loraformat.storage.base import Copy, Store, Writer
from loraformat.storage.faults import checked_range

# A file up to this size is kept whole, as long as all that are kept are no more than the other number.
_FILE_NBYTES, _MOST_NBYTES = 64 << 20, 128 << 20
# Reads beyond the begin of a file before it is fetched whole: headers take fewer.
_HEAD_NBYTES, _READS = 4096, 3


class WholeFiles:
    """A store whose files are fetched whole once many of their bytes are asked for. See Store.

    Args:
        store: where a read takes a request.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.uri = store, store.uri
        self._reads: dict[str, int] = {}
        self._whole: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def is_single_file(self) -> bool:
        """See Source."""
        return self.store.is_single_file

    def files(self) -> Mapping[str, int]:
        """See Source."""
        return self.store.files()

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return self.store.folders()

    def size(self, path: str) -> int:
        """See Source."""
        return self.store.size(path)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Source."""
        whole = self._fetched(path, offset)
        if whole is None:
            return self.store.read(path, offset, nbytes)
        count = len(whole) - offset if nbytes is None else nbytes
        checked_range(f"{self.uri}/{path}", len(whole), offset, count)
        return whole[offset : offset + count]

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Source."""
        whole = self._fetched(path, offset)
        if whole is None:
            self.store.read_into(path, offset, buffer)
            return
        view = memoryview(buffer).cast("B")
        checked_range(f"{self.uri}/{path}", len(whole), offset, view.nbytes)
        view[:] = whole[offset : offset + view.nbytes]

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source."""
        return self.store.identity(path)

    def check_inside(self, path: str) -> None:
        """See Source."""
        self.store.check_inside(path)

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """See Store."""
        return self.store.create(path, size, copies)

    def _fetched(self, path: str, offset: int) -> bytes | None:
        """All bytes of a file, where they are here or are fetched now."""
        with self._lock:
            if path in self._whole:
                return self._whole[path]
            if offset < _HEAD_NBYTES:
                return None
            self._reads[path] = self._reads.get(path, 0) + 1
            room = _MOST_NBYTES - sum(map(len, self._whole.values()))
            if self._reads[path] < _READS or self.store.size(path) > min(room, _FILE_NBYTES):
                return None
            self._whole[path] = self.store.read(path)
            return self._whole[path]
