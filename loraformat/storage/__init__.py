"""Bytes by path. `open_store` gives a Store, `stage` an output folder that is there whole or not at all."""

from __future__ import annotations

import os
import re

from loraformat.errors import StorageError
from loraformat.storage.base import Source, Store, Writer
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.direct import PAGE_NBYTES, address_of, memory_at
from loraformat.storage.faults import kind_of
from loraformat.storage.hashing import ALGORITHM, Hash, Run, digest_of, digest_of_range, new_hash, uncovered
from loraformat.storage.local.folders import Folder, folders_below
from loraformat.storage.local.staging import MARKER, require_space, stage
from loraformat.storage.local.store import CHECKPOINT_SUFFIXES, WEIGHT_SUFFIXES, LocalStore
from loraformat.storage.local.targets import ANYONE, is_restricted, permissions_for
from loraformat.storage.local.through import write_to
from loraformat.storage.locations import Location, listed, uri_of, uri_or_none
from loraformat.storage.memory import MemoryStore

__all__ = [
    "ALGORITHM",
    "ANYONE",
    "CHECKPOINT_SUFFIXES",
    "MARKER",
    "PAGE_NBYTES",
    "WEIGHT_SUFFIXES",
    "Folder",
    "Hash",
    "LocalStore",
    "Location",
    "MemoryStore",
    "Run",
    "Source",
    "Store",
    "Writer",
    "address_of",
    "copy_blocks",
    "digest_of",
    "digest_of_range",
    "folders_below",
    "is_restricted",
    "kind_of",
    "listed",
    "memory_at",
    "new_hash",
    "open_store",
    "permissions_for",
    "require_space",
    "stage",
    "uncovered",
    "uri_of",
    "uri_or_none",
    "write_to",
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
    if re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*(@[\w.\-]+)?", uri) and not os.path.lexists(uri):
        raise StorageError("no such file or folder", where=uri, hint=f"for the Hub write hf://{uri}")
    return LocalStore(uri)
