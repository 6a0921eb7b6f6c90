"""An output for the Hub: files collected on this machine, and those that the Hub copies."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Source, Writer
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.faults import checked_name, checked_range
from loraformat.storage.hub.addresses import Address
from loraformat.storage.hub.repository import HubStore
from loraformat.storage.local.store import OWN_PREFIX, HiddenFolder

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_PREVIOUS_NBYTES = 1 << 20


class WholeCopy(NamedTuple):
    """A file of a repository whose bytes an output has unchanged."""

    source: HubStore
    path: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.source.size(self.path)

    @property
    def sha256(self) -> str:
        """Of its bytes."""
        return self.source.listed(self.path).sha256

    @property
    def address(self) -> Address:
        """Where it lies: the commit at which it was opened, and its path in the repository."""
        found = self.source.address
        return Address(found.repository, found.revision, found.inside(self.path))


class HubOutput(HiddenFolder):
    """See Output: a temporary folder, and a list of large files of repositories that the output has unchanged.

    Args:
        folder: an empty folder of this machine.
        address: where the output will be.
        permissions: of the files in the folder.
        reads_copies: see Output.
        before: what is there now; None for nothing.
    """

    def __init__(
        self, folder: str, address: Address, permissions: int, *, reads_copies: bool, before: Address | None = None
    ) -> None:
        super().__init__(folder, permissions)
        self._before = before
        self.uri = str(address)
        self.reads_copies = reads_copies
        self.copies: dict[str, WholeCopy] = {}

    @contextmanager
    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> Iterator[Writer]:
        """See Store. A large file of a repository that is copied whole is only noted."""
        copy = _whole(size, copies)
        if copy is None:
            with super().create(path, size, copies) as writer:
                yield writer
            self.copies.pop(path, None)
            return
        with CopyWriter(copy, f"{self.uri}/{checked_name(path, self.uri)}") as taker:
            yield taker
        super().remove(path)
        self.copies[path] = copy

    def seal(self, names: Collection[str]) -> None:
        """See Output: files that are complete can be read at any time."""

    def files(self) -> Mapping[str, int]:
        """See Store."""
        return dict(sorted({**super().files(), **{name: one.nbytes for name, one in self.copies.items()}}.items()))

    def size(self, path: str) -> int:
        """See Store."""
        return self.copies[path].nbytes if path in self.copies else super().size(path)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Store; what the Hub will copy is read where it is."""
        if path in self.copies:
            source, name = self.copies[path]
            return source.read(name, offset, nbytes)
        return super().read(path, offset, nbytes)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Store."""
        if path in self.copies:
            source, name = self.copies[path]
            source.read_into(name, offset, buffer)
        else:
            super().read_into(path, offset, buffer)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source."""
        return (
            self.copies[path].source.identity(self.copies[path].path) if path in self.copies else super().identity(path)
        )

    def names(self) -> list[str]:
        """See Output."""
        return sorted({*super().names(), *self.copies})

    def is_own(self, path: str) -> bool:
        """See Output."""
        return path in self.copies or super().is_own(path)

    def remove(self, path: str) -> None:
        """See Output."""
        self.copies.pop(path, None)
        super().remove(path)

    def collected(self) -> dict[str, str]:
        """The files in the folder and below it: path in the output → path on this machine."""
        found: dict[str, str] = {}
        for above, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(above, name)
                inner = os.path.relpath(path, self.folder).replace(os.sep, "/")
                if not name.startswith(OWN_PREFIX):
                    found[inner] = path
        return found

    def previous(self, path: str) -> bytes | None:
        """A small file that is in the place of the output now; None where there is none.

        Raises: StorageError: it is not small.
        """
        store = None if self._before is None else HubStore(str(self._before))
        if store is None or path not in store.files():
            return None
        if store.size(path) > _MOST_PREVIOUS_NBYTES:
            text = f"it has {store.size(path)} bytes, but at most {_MOST_PREVIOUS_NBYTES} can be updated"
            raise StorageError(text, where=f"{self.uri}/{path}", hint="use --no-card to leave it alone")
        return store.read(path)

    def replaces(self, path: str) -> bool:
        """Whether a file of this name is in the place of the output now."""
        return self._before is not None and path in HubStore(str(self._before)).files()

    def fetched(self, name: str, copy: WholeCopy) -> str:
        """The path on this machine of a file of a repository, whose bytes are read for that."""
        with super().create(name, copy.nbytes) as writer:
            copy_blocks(writer, copy.source, copy.path, 0, 0, copy.nbytes)
        return os.path.join(self.folder, name)


class CopyWriter:
    """See Writer: takes the bytes of a file that the Hub will copy, and moves none.

    Bytes that are written are compared with the SHA-256 that the Hub has of the file, where they come in order.
    """

    def __init__(self, copy: WholeCopy, where: str) -> None:
        self._copy, self._where = copy, where
        self._count, self._position = 0, 0
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Raises: StorageError: bytes are missing, or others than those of the file."""
        if kind is not None:
            return
        nbytes = self._copy.nbytes
        if self._count < nbytes:
            raise StorageError(f"expected {nbytes} bytes, but {self._count} were written", where=self._where)
        if self._position == nbytes and self._hash.hexdigest() != self._copy.sha256:
            raise StorageError("the bytes do not have the SHA-256 that the Hub lists", where=str(self._copy.address))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        self.write_at(self._position, data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See Writer."""
        view = memoryview(data).cast("B")
        with self._lock:
            if offset == self._position:
                self._hash.update(view)
                self._position += view.nbytes
        self._add(view.nbytes)

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """See Writer. Raises: StorageError: not a range of the file that was announced."""
        if (source, path, source_offset) != (self._copy.source, self._copy.path, offset):
            raise StorageError("the bytes differ from those that were announced", where=self._where)
        checked_range(path, self._copy.nbytes, offset, nbytes)
        self._add(nbytes)

    def clone_from(self, source: Source, path: str) -> bool:
        """See Writer: never, so that bytes which pass through this machine anyway are compared."""
        del source, path
        return False

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self._count += nbytes


def _whole(size: int | None, copies: Sequence[Copy]) -> WholeCopy | None:
    """The one large file of a repository whose bytes a new file has, if it is that."""
    if len(copies) != 1 or not size:
        return None
    offset, nbytes, source, path, source_offset = copies[0]
    if (offset, source_offset, nbytes) != (0, 0, size) or not isinstance(source, HubStore):
        return None
    found = WholeCopy(source, path)
    return found if found.sha256 and found.nbytes == size else None
