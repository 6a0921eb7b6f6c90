"""Bytes by path. `open_store` gives a Store, `stage` an output folder that is there whole or not at all."""

from __future__ import annotations

import os
import re

from loraformat.errors import StorageError
from loraformat.storage.base import Store, Writer
from loraformat.storage.direct import PAGE_NBYTES, address_of, memory_at
from loraformat.storage.local import LocalStore
from loraformat.storage.memory import MemoryStore
from loraformat.storage.staging import require_space, stage

__all__ = [
    "PAGE_NBYTES",
    "LocalStore",
    "MemoryStore",
    "Store",
    "Writer",
    "address_of",
    "memory_at",
    "open_store",
    "require_space",
    "stage",
]


def open_store(uri: str) -> Store:
    """The files of a local folder, one local file as a store with one entry, or a repository (`hf://owner/name`).

    Raises: StorageError: there is no such file, folder or repository, or the URI has another scheme.
    """
    if uri.startswith("hf://"):
        from loraformat.storage.hub import open_repository

        return open_repository(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme:
        raise StorageError(
            f"{scheme[1]}:// is not supported in this version", where=uri, hint="download it and give the folder"
        )
    if re.fullmatch(r"[\w.\-]+/[\w.\-]+(@[\w.\-]+)?", uri) and not os.path.lexists(uri):
        raise StorageError("no such file or folder", where=uri, hint=f"for the Hub write hf://{uri}")
    return LocalStore(uri)
