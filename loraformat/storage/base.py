"""Bytes by path, as protocols. Knows nothing of tensors or LoRA."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol


class Source(Protocol):
    """What can be read of one folder (not of its subfolders), or of one file alone. One opening is one state of it."""

    uri: str

    @property
    def is_single_file(self) -> bool:
        """Whether it is one file rather than a folder."""

    def files(self) -> Mapping[str, int]:
        """Regular files by name → size in bytes, sorted."""

    def folders(self) -> tuple[str, ...]:
        """Names of subfolders, sorted; hidden ones left out. Their content cannot be reached from here."""

    def size(self, path: str) -> int:
        """Bytes of one file, without looking at the others. Raises StorageError where there is none."""

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """A range of a file, or from `offset` to its end. A range that the file does not have raises StorageError."""

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises StorageError when the file ends before."""

    def identity(self, path: str) -> tuple[str | int, ...]:
        """What tells a file from any other that may stand under its name at another time."""

    def check_inside(self, path: str) -> None:
        """Raises: StorageError: `path` leads out of the folder, so that its content must not be copied."""


class Copy(NamedTuple):
    """Bytes of a file that is made which are those of another file."""

    offset: int
    nbytes: int
    source: Source
    path: str
    source_offset: int


class Writer(Protocol):
    """A file that is being written; it appears under its name when its context ends without an exception."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; any order, from any thread."""

    def copy_from(self, source: Source, path: str, source_offset: int, offset: int, nbytes: int) -> None:
        """Put `nbytes` bytes of `source`'s file `path` at `offset`, without moving them here where the store can."""

    def clone_from(self, source: Source, path: str) -> bool:
        """Share all bytes of `source`'s file `path`, to be written over; False where nothing was done."""


class Store(Source, Protocol):
    """A folder that can be written to as well."""

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """A new file.

        Args:
            size: its bytes, where known: they are reserved first, so that a full disk shows at once.
            copies: runs that will come by `copy_from`, as far as known: a store that takes parts cuts the file there.
        """


class Output(Store, Protocol):
    """An output that is being made: nobody sees it before it is whole."""

    @property
    def location(self) -> str:
        """URI under which another process opens the same unfinished output, to write a file into it."""

    @property
    def permissions(self) -> int:
        """Mode bits that its files may have, where there are such bits."""

    @property
    def reads_copies(self) -> bool:
        """Whether copied bytes pass through this process anyway, so that reading them costs nothing more."""

    @property
    def refused(self) -> str:
        """What the store answered where it did not copy what lies in it, so that the bytes passed through here; ""."""

    def proves(self, path: str) -> bool | None:
        """Whether the store knows that a file of an interrupted run is as it was sent; None: its bytes tell."""

    def subfolder(self, name: str) -> AbstractContextManager[Output]:
        """A subfolder to write files into, on the disk when the block ends."""

    def names(self) -> list[str]:
        """Names of everything in it, sorted; files that this package keeps for the time of a run included."""

    def is_own(self, path: str) -> bool:
        """Whether `path` is a regular file that no other name leads to."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""

    def remove_folder(self, name: str) -> None:
        """Remove a subfolder, and all that is in it."""

    def nbytes(self) -> int:
        """Bytes of all files, those of subfolders included."""

    def seal(self, names: Collection[str]) -> None:
        """The weight files `names` are complete: from now on they can be read here, by `size` and `read`.

        A store of objects assembles them; in a folder they can be read as soon as they are written.
        """


class Stage(Protocol):
    """Makes an output; see `storage.stage`, whose arguments it takes."""

    def __call__(
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
    ) -> AbstractContextManager[Output]:
        """An output that appears under the URI `target` when the block ends without an exception."""


class Join(Protocol):
    """Opens an unfinished output that several processes write; see `storage.join`, whose arguments it takes."""

    def __call__(
        self,
        target: str,
        word: str,
        *,
        overwrite: bool,
        inputs: Sequence[str] = (),
        names: Collection[str] = (),
        written: Callable[[str], Collection[str]] | None = None,
        permissions: int = 0o777,
    ) -> AbstractContextManager[Output]:
        """The unfinished output `word` of the URI `target`; it is kept when the block ends."""
