"""Addresses of services that fsspec knows (gs://, az:// and others), for reading. Not run against the services.

fsspec is imported when the first of them is opened, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from loraformat.diagnostics import show, show_address
from loraformat.errors import LoraFormatError, MissingExtra, StorageError
from loraformat.storage.base import Copy, Writer
from loraformat.storage.faults import checked_name, checked_range
from loraformat.storage.local.store import OWN_PREFIX

# By scheme, what pip installs for it.
ADAPTERS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_HEAD_NBYTES = 128 << 10
_ATTEMPTS = 4
_PAUSE_S = 0.5  # twice as long each time
_MOST_AT_ONCE = 16 << 20
# Of what a listing says of a file, what changes with its content; services differ in what they call it.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "last_modified", "LastModified", "created")


def open_filesystem(uri: str) -> FilesystemStore:
    """The files at an address. Raises: StorageError: there are none, or they cannot be read."""
    return FilesystemStore(uri)


class FilesystemStore:
    """The files of one folder of an fsspec file system, or one file alone. Read only.

    Sizes are those of the first listing; every answer is as long as was asked for, or an error. Files are compared by
    what the listing says of them when they are opened, not while they are read.

    Raises: MissingExtra (LF029): fsspec, or its part for the service, is not installed. StorageError: nothing there.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._system, self._path = _connected(self.uri)
        self._heads: dict[str, bytes] = {}
        self._only: str | None = None
        with as_storage_error(self.uri):
            info = self._system.info(self._path)
            is_file = info.get("type") == "file"
            entries = [info] if is_file else self._system.ls(self._path, detail=True)
        if is_file:
            self._path, _, self._only = self._path.rpartition("/")
        files = {_name(one): one for one in entries if one.get("type") == "file" and isinstance(one.get("size"), int)}
        self._files = {name: one for name, one in sorted(files.items()) if not name.startswith(OWN_PREFIX)}
        folders = [_name(one) for one in entries if one.get("type") == "directory"]
        self._folders = tuple(sorted(name for name in folders if name and not name.startswith(".")))
        if not self._files and not self._folders:
            raise StorageError("no files found", where=show_address(self.uri))

    @property
    def is_single_file(self) -> bool:
        """See Source."""
        return self._only is not None

    def files(self) -> Mapping[str, int]:
        """See Source."""
        return {name: int(one["size"]) for name, one in self._files.items()}

    def folders(self) -> tuple[str, ...]:
        """See Source."""
        return self._folders

    def below(self, name: str) -> FilesystemStore:
        """A subfolder. Raises: StorageError: there is none."""
        return FilesystemStore(f"{self.uri}/{checked_name(name, self.uri)}")

    def size(self, path: str) -> int:
        """See Source."""
        return int(self._listed(path)["size"])

    def _listed(self, path: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] | None = self._files.get(checked_name(path, self.uri))
        if found is None:
            raise StorageError("no such file", where=f"{self.uri}/{show(path)}")
        return found

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """See Source."""
        size = self.size(path)
        count = size - offset if nbytes is None else nbytes
        checked_range(self._where(path), size, offset, count)
        if offset + count <= min(size, _HEAD_NBYTES):
            if path not in self._heads:
                self._heads[path] = self._range(path, 0, min(size, _HEAD_NBYTES))
            return self._heads[path][offset : offset + count]
        starts = range(offset, offset + count, _MOST_AT_ONCE)
        return b"".join(self._range(path, start, min(_MOST_AT_ONCE, offset + count - start)) for start in starts)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """See Source."""
        view = memoryview(buffer).cast("B")
        view[:] = self.read(path, offset, view.nbytes)

    def identity(self, path: str) -> tuple[str | int, ...]:
        """See Source: the size, and what the service lists that changes with the content."""
        found = self._listed(path)
        return (self.size(path), *(str(found[mark]) for mark in _MARKS if mark in found))

    def check_inside(self, path: str) -> None:
        """See Source: there are no links."""

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> AbstractContextManager[Writer]:
        """Raises: StorageError, always."""
        del size, copies
        raise StorageError("cannot write there", where=self._where(path), hint="write to a folder or s3://")

    def _where(self, path: str) -> str:
        return f"{self.uri}/{show(path)}"

    def _range(self, path: str, start: int, nbytes: int) -> bytes:
        """Bytes of a file. Raises: StorageError: others came, as from servers that do not know ranges."""
        if nbytes == 0:
            return b""
        full, where = f"{self._path}/{path}" if self._path else path, self._where(path)
        for attempt in range(_ATTEMPTS):
            try:
                with as_storage_error(where):
                    data = bytes(self._system.cat_file(full, start=start, end=start + nbytes))
            except StorageError:
                if attempt + 1 == _ATTEMPTS:
                    raise
            else:
                if len(data) == nbytes:
                    return data
                if len(data) > nbytes or attempt + 1 == _ATTEMPTS:
                    text = f"bytes {start} to {start + nbytes} were requested, but {len(data)} bytes came"
                    raise StorageError(f"{text}: the service does not support range requests", where=where)
            time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")


def _connected(uri: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    scheme = uri.partition("://")[0].lower()
    try:
        import fsspec
    except ModuleNotFoundError as error:
        if error.name != "fsspec":
            raise
        raise MissingExtra(f"{scheme}:// needs fsspec", hint="pip install 'loraformat[fsspec]'") from None
    with as_storage_error(uri):
        try:
            system, path = fsspec.core.url_to_fs(uri)
        except ImportError:
            hint = f"pip install {ADAPTERS[scheme]}"
            raise MissingExtra(f"{scheme}:// needs {ADAPTERS[scheme]}", hint=hint) from None
    return system, str(path)


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name", "")).rstrip("/").rpartition("/")[2]


@contextmanager
def as_storage_error(where: str) -> Iterator[None]:
    """A block in which every error of a service becomes a StorageError; their texts are not repeated."""
    try:
        yield
    except LoraFormatError:
        raise
    except FileNotFoundError:
        raise StorageError("no such file or folder", where=show_address(where)) from None
    except PermissionError:
        raise StorageError("access denied", where=show_address(where)) from None
    except Exception as error:  # noqa: BLE001 - each service has exceptions of its own
        raise StorageError(f"the service cannot be read ({type(error).__name__})", where=show_address(where)) from None
