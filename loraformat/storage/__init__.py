"""Bytes by path. `open_store` gives a Store, `stage` an output folder that is there whole or not at all."""

from __future__ import annotations

import re

from loraformat.errors import StorageError
from loraformat.storage.base import Store, Writer
from loraformat.storage.direct import PAGE_NBYTES
from loraformat.storage.local import LocalStore
from loraformat.storage.memory import MemoryStore
from loraformat.storage.staging import require_space, stage

__all__ = ["PAGE_NBYTES", "LocalStore", "MemoryStore", "Store", "Writer", "open_store", "require_space", "stage"]


def open_store(uri: str) -> Store:
    """The files of a local folder, or one local file as a store with one entry.

    Raises: StorageError: there is no such file or folder, or the URI has a scheme.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme:
        raise StorageError(
            f"{scheme[1]}:// is not supported in this version", where=uri, hint="download it and give the folder"
        )
    return LocalStore(uri)
