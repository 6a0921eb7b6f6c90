"""A folder of a repository on the Hugging Face Hub, read by ranges: headers cost kilobytes, whatever the weights."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from loraformat.diagnostics import show
from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Writer
from loraformat.storage.faults import checked_local_name, checked_name, checked_range
from loraformat.storage.hub.addresses import Address
from loraformat.storage.hub.cached import CachedRepository
from loraformat.storage.hub.connection import Connection, ListedFile, State
from loraformat.storage.hub.faults import as_hub_error
from loraformat.storage.local.store import LocalStore

_HEAD_NBYTES = 128 << 10  # of a safetensors file: the header of nearly all shards lies in it
_MOST_AT_ONCE = 32 << 20


def open_repository(uri: str) -> HubStore | CachedRepository:
    """The files of a repository: of the Hub, or with HF_HUB_OFFLINE of the cache of the Hub's own tools.

    Args:
        uri: hf://owner/name, with @revision (branch, tag or commit) and /folder or /folder/file if wanted.

    Raises: StorageError: no such address or repository, no access, no connection, nothing in the cache.
    """
    with as_hub_error(uri):
        from huggingface_hub import constants

    return CachedRepository(uri) if constants.HF_HUB_OFFLINE else HubStore(uri)


class HubStore:
    """The files of a repository, of one folder of it, or one file of it, at one commit. Read only.

    The revision is resolved once; every byte is then asked for by the commit, which stands in `uri`, so that a branch
    that moves in between changes nothing. Files that the cache of the Hub's own tools has at this commit are read
    there. The token that those tools use goes to the Hub alone. Answers are bounded in bytes and time; what is busy or
    cut is asked for again.

    Args:
        uri: see `open_repository`.
        endpoint: where the Hub is; None for the Hub's own tools to say.
        wait: how to pass some seconds before a request is made again.
        patience_s: seconds for a whole answer without a body.

    Raises: StorageError: no such address or repository, no access, no connection.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str | None = None,
        wait: Callable[[float], None] = time.sleep,
        patience_s: float | None = None,
    ) -> None:
        address = Address.parse(uri)
        self._heads: dict[str, bytes] = {}
        self._in_cache: dict[str, LocalStore | None] = {}
        self._lock = threading.Lock()
        with as_hub_error(uri):
            self._connection = Connection.open(endpoint, wait, patience_s)
            self._state: State = self._connection.state(address)
        self.uri = str(address.at(self._state.commit))
        self.is_single_file = bool(address.folder) and address.folder in self._state.files
        if self.is_single_file:
            folder, _, name = address.folder.rpartition("/")
            address = Address(address.repository, address.revision, folder)
            self._files = {name: self._state.files[address.inside(name)].nbytes}
        else:
            self._files = self._inside(address)
        self.address = address.at(self._state.commit)
        if address.folder and not any(name.startswith(f"{address.folder}/") for name in self._state.files):
            raise StorageError("the repository has no such folder or file", where=uri)

    def _inside(self, address: Address) -> dict[str, int]:
        prefix = address.inside("")
        found = {name.removeprefix(prefix): one for name, one in self._state.files.items() if name.startswith(prefix)}
        return dict(sorted((name, one.nbytes) for name, one in found.items() if "/" not in name))

    def files(self) -> Mapping[str, int]:
        """See Store."""
        return self._files

    def folders(self) -> tuple[str, ...]:
        """See Store."""
        prefix = self.address.inside("")
        inner = [name.removeprefix(prefix) for name in self._state.files if name.startswith(prefix)]
        found = {name.partition("/")[0] for name in inner if "/" in name and not name.startswith(".")}
        return () if self.is_single_file else tuple(sorted(found))

    def listed(self, path: str) -> ListedFile:
        """What the Hub says of a file. Raises: StorageError: there is none."""
        self.size(path)
        return self._state.files[self.address.inside(path)]

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Store."""
        size = self.size(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(path, size, offset, count)
        cached = self._cached(path, size)
        if cached is not None:
            return cached.read(os.path.basename(path), offset, count)
        if offset + count <= min(size, _HEAD_NBYTES):
            if path not in self._heads:
                self._heads[path] = self._range(path, 0, min(size, _HEAD_NBYTES))
            return self._heads[path][offset : offset + count]
        starts = range(offset, offset + count, _MOST_AT_ONCE)
        return b"".join(self._range(path, start, min(_MOST_AT_ONCE, offset + count - start)) for start in starts)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Store."""
        view = memoryview(buffer).cast("B")
        view[:] = self.read(path, offset, view.nbytes)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: the commit stands in the URI."""
        return (self.uri, path)

    def check_inside(self, path: str) -> None:
        """See Source: a repository has no links."""

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """Raises: StorageError, always."""
        del size, copies
        raise StorageError("an opened repository is read-only", where=self._where(path))

    def size(self, path: str) -> int:
        """See Store."""
        size = self.files().get(checked_name(path, self.uri))
        if size is None:
            raise StorageError("no such file", where=self._where(show(path)))
        return size

    def _where(self, path: str) -> str:
        return str(Address(self.address.repository, self.address.revision, self.address.inside(path)))

    def _cached(self, path: str, size: int) -> LocalStore | None:
        """The folder of the user's cache that holds a file at this commit; None where it has none of that size."""
        with self._lock:
            if path not in self._in_cache:
                self._in_cache[path] = _cached_folder(self.address, path, size)
            return self._in_cache[path]

    def _range(self, path: str, start: int, nbytes: int) -> bytes:
        if nbytes == 0:
            return b""
        size, address = self.size(path), self.address
        with as_hub_error(self._where(path)):
            return self._connection.range(address.repository, address.branch, address.inside(path), start, nbytes, size)


def _cached_folder(address: Address, path: str, size: int) -> LocalStore | None:
    from huggingface_hub import try_to_load_from_cache

    inner = address.inside(path)
    try:
        for part in inner.split("/"):
            checked_local_name(part, str(address))
        found = try_to_load_from_cache(address.repository, inner, revision=address.revision)
        if not isinstance(found, str):
            return None
        store = LocalStore(os.path.dirname(found))
        return store if store.size(os.path.basename(found)) == size else None
    # What the cache cannot have, by us or by the library (ValueError), or has lost, is asked for at the Hub.
    except (StorageError, ValueError):
        return None
