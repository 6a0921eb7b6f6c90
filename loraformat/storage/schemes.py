"""Where files lie, by the scheme of a URI: how they are opened there, and how outputs are made."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from loraformat.errors import StorageError
from loraformat.storage.base import Join, Stage, Store
from loraformat.storage.local.staging import join as _join_folder
from loraformat.storage.local.staging import require_space as _require_space
from loraformat.storage.local.staging import stage as _stage_folder
from loraformat.storage.local.store import LocalStore

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of place.

    Attributes:
        open: the files at a URI. Raises StorageError: there are none.
        stage: makes an output at a URI; None where nothing can be written.
        require_space: raises StorageError where so many bytes have no room at a URI.
        modes: whether files there have mode bits that keep others from reading them.
        join: opens an unfinished output that several processes write; None where that is not possible.
    """

    open: Callable[[str], Store]
    stage: Stage | None = None
    require_space: Callable[[str, int], None] = lambda uri, nbytes: None  # noqa: ARG005
    modes: bool = False
    join: Join | None = None


def _open_repository(uri: str) -> Store:
    from loraformat.storage.hub import open_repository

    return open_repository(uri)


def _open_local(uri: str) -> Store:
    if re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*(@[\w.\-]+)?", uri) and not os.path.lexists(uri):
        raise StorageError("no such file or folder", where=uri, hint=f"for the Hub write hf://{uri}")
    return LocalStore(uri)


# By the scheme in lower case; "" for paths of this machine.
SCHEMES: dict[str, Scheme] = {
    "": Scheme(_open_local, _stage_folder, _require_space, modes=True, join=_join_folder),
    "hf": Scheme(_open_repository),
}


def scheme_of(uri: str) -> Scheme:
    """The scheme of a URI. Raises StorageError: none of SCHEMES has this name."""
    found = _SCHEME.match(uri)
    name = found[1].lower() if found else ""
    if name not in SCHEMES:
        hint = "download it and give the folder"
        raise StorageError(f"{name}:// is not supported in this version", where=uri, hint=hint)
    return SCHEMES[name]


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return _SCHEME.match(uri) is None


def stage_of(uri: str) -> Stage:
    """How an output is made at a URI. Raises StorageError: nothing can be written there."""
    stage = scheme_of(uri).stage
    if stage is None:
        raise StorageError("outputs are not written there", where=uri, hint="write a folder of this machine")
    return stage


def join_of(uri: str) -> Join:
    """How several processes write one output at a URI. Raises StorageError: they cannot."""
    join = scheme_of(uri).join
    if join is None:
        hint = "write a folder that all of them see"
        raise StorageError("several processes cannot write one output there", where=uri, hint=hint)
    return join
