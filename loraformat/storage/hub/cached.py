"""A repository in the cache of huggingface_hub, for offline work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from loraformat.errors import StorageError
from loraformat.storage.base import Copy
from loraformat.storage.faults import checked_local_name
from loraformat.storage.hub.addresses import Address
from loraformat.storage.hub.faults import as_hub_error
from loraformat.storage.local.store import LocalStore


class CachedRepository(LocalStore):
    """The files of a repository, of one folder of it, or one file, as they lie in the cache. Read only.

    Raises: StorageError: the cache does not have the repository at that revision, or only a part of it.
    """

    def __init__(self, uri: str) -> None:
        address = Address.parse(uri)
        with as_hub_error(uri):
            snapshot = _snapshot(address)
        parts = address.folder.split("/") if address.folder else []
        super().__init__(os.path.join(snapshot, *(checked_local_name(part, uri) for part in parts)))
        self.uri = str(address.at(os.path.basename(snapshot)))

    def create(self, path: str, size: int | None = None, copies: Sequence[Copy] = ()) -> NoReturn:
        """Raises: StorageError, always."""
        del size, copies
        raise StorageError("the Hub cache is never written to", where=f"{self.uri}/{path}")

    def remove(self, path: str) -> NoReturn:
        """Raises: StorageError, always."""
        raise StorageError("nothing is ever removed from the Hub cache", where=f"{self.uri}/{path}")

    def subfolder(self, name: str) -> NoReturn:
        """Raises: StorageError, always: it would be made. `below` opens one for reading."""
        raise StorageError("the Hub cache is never written to", where=f"{self.uri}/{name}")

    def remove_folder(self, name: str) -> NoReturn:
        """Raises: StorageError, always."""
        raise StorageError("nothing is ever removed from the Hub cache", where=f"{self.uri}/{name}")


def _snapshot(address: Address) -> str:
    """The folder of a commit in the cache."""
    from huggingface_hub import errors, snapshot_download

    repository, revision = address.repository, address.revision
    try:
        found = snapshot_download(repository, revision=revision, local_files_only=True, library_name="loraformat")
    except errors.LocalEntryNotFoundError as error:
        asked = repository if revision is None else f"{repository} --revision {revision}"
        message = "HF_HUB_OFFLINE is set, but the cache does not have all of this repository (offline)"
        raise StorageError(
            message, hint=f"run hf download {asked}, unset HF_HUB_OFFLINE, or pass a local folder"
        ) from error
    return str(found)
