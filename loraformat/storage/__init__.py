"""Bytes by path. `open_store` returns a Store, `stage` an output folder that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import cast

from loraformat.errors import StorageError
from loraformat.storage.base import Copy, Output, Source, Store, Writer
from loraformat.storage.blocks import copy_blocks
from loraformat.storage.direct import PAGE_NBYTES, address_of, memory_at
from loraformat.storage.faults import kind_of
from loraformat.storage.hashing import ALGORITHM, Hash, Run, digest_of, digest_of_range, new_hash, uncovered
from loraformat.storage.local.folders import Folder, folders_below
from loraformat.storage.local.spool import Spool, open_spool
from loraformat.storage.local.staging import MARKER
from loraformat.storage.local.store import CHECKPOINT_SUFFIXES, OWN_PREFIX, WEIGHT_SUFFIXES, LocalStore
from loraformat.storage.local.targets import ANYONE, is_restricted, refuse_names
from loraformat.storage.local.targets import permissions_for as folder_permissions
from loraformat.storage.local.through import is_own_stream, write_to
from loraformat.storage.locations import Location, listed, uri_of, uri_or_none
from loraformat.storage.members import MemberStore
from loraformat.storage.memory import MemoryStore
from loraformat.storage.publication import Publication, Published, Publishing, check_publication
from loraformat.storage.remote.whole_files import WholeFiles
from loraformat.storage.schemes import (
    check_of,
    check_target,
    is_hub,
    is_local,
    join_of,
    refuse_inputs,
    scheme_of,
    stage_of,
)
from loraformat.storage.tar import TarStore

__all__ = [
    "ALGORITHM",
    "ANYONE",
    "CHECKPOINT_SUFFIXES",
    "MARKER",
    "OWN_PREFIX",
    "PAGE_NBYTES",
    "WEIGHT_SUFFIXES",
    "Copy",
    "Folder",
    "Hash",
    "LocalStore",
    "Location",
    "MemberStore",
    "MemoryStore",
    "Output",
    "Publication",
    "Published",
    "Publishing",
    "Run",
    "Source",
    "Spool",
    "Store",
    "TarStore",
    "Writer",
    "address_of",
    "base",
    "check_names",
    "check_output",
    "check_publication",
    "check_target",
    "copy_blocks",
    "digest_of",
    "digest_of_range",
    "folders_below",
    "has_folders",
    "hub",
    "identity_anywhere",
    "is_hub",
    "is_local",
    "is_own_stream",
    "is_restricted",
    "join",
    "kind_of",
    "listed",
    "local",
    "memory_at",
    "new_hash",
    "open_below",
    "open_output",
    "open_spool",
    "open_store",
    "open_store_of_adapter",
    "permissions_for",
    "platform",
    "publication",
    "require_space",
    "stage",
    "uncovered",
    "unfinished",
    "uri_of",
    "uri_or_none",
    "write_to",
]


def open_store(uri: str) -> Store:
    """The files of a local folder, one local file as a store with one entry, or a repository (`hf://owner/name`).

    Raises: StorageError: there is no such file, folder or repository, or the URI has another scheme.
    """
    scheme = scheme_of(uri)
    if scheme.is_location:
        raise StorageError("an unfinished output, which only its own run may open", where=uri)
    return scheme.open(uri)


def open_output(location: str, permissions: int) -> Store:
    """An unfinished output by its `Output.location`, to write a file into it with no other mode bits than these."""
    scheme = scheme_of(location)
    return LocalStore(location, permissions) if scheme.modes else scheme.open(location)


def open_store_of_adapter(uri: str) -> Store:
    """As `open_store`; files up to 64 MiB that are not on this machine are fetched whole, not tensor by tensor."""
    store = open_store(uri)
    return store if isinstance(store, LocalStore) else WholeFiles(store)


def has_folders(store: object) -> bool:
    """Whether `open_below` opens the subfolders of a store."""
    return hasattr(store.store if isinstance(store, WholeFiles) else store, "below")


def open_below(store: object, name: str) -> Source | None:
    """A subfolder of a store, for reading; None where folders are not opened one from the other."""
    inner = store.store if isinstance(store, WholeFiles) else store
    below: Callable[[str], Source] | None = getattr(inner, "below", None)
    if below is None:
        return None
    return below(name) if inner is store else WholeFiles(cast("Store", below(name)))


def stage(
    target: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    resume: bool = False,
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
    permissions: int = ANYONE,
    on_cleared: Callable[[int], None] | None = None,
    word: str | None = None,
    publishing: Publishing | None = None,
) -> AbstractContextManager[Output]:
    """An output that appears under the URI `target` when the block ends without exception; see `local.staging.stage`.

    Args:
        word: finish the unfinished output of this word (see `join`); it is kept where the block raises.
        publishing: how it gets onto the Hub.

    Raises: StorageError: nothing can be written there, or there is no such unfinished output. UsageError: options of
        the Hub for another kind of output.
    """
    refuse_inputs(target, inputs)
    return stage_of(target, publishing)(
        target,
        overwrite=overwrite,
        inputs=inputs,
        resume=resume,
        names=names,
        written=written,
        permissions=permissions,
        on_cleared=on_cleared,
        word=word,
    )


def check_output(
    target: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
) -> None:
    """What `stage` checks before it writes, for a dry run: the output may be written, and replaces only what it may.

    Raises: StorageError: as `stage`; what stands in a repository of the Hub is not compared.
    """
    refuse_inputs(target, inputs)
    check = check_of(target)
    if check is not None:
        check(target, overwrite=overwrite, inputs=inputs, names=names, written=written)


def check_names(target: str, names: Collection[str]) -> None:
    """Check the names of all files of an output before the first is made, for a run that passes none to `stage`.

    Raises: StorageError: a file cannot have its name on this machine, on which the output stays or is collected.
    """
    if is_local(target) or is_hub(target):
        refuse_names(target, names)


def join(
    target: str,
    word: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
    permissions: int = ANYONE,
) -> AbstractContextManager[Output]:
    """The unfinished output `word` of the URI `target`, for several processes at a time; see `local.staging.join`.

    Raises: StorageError: several processes cannot write one output there.
    """
    refuse_inputs(target, inputs)
    return join_of(target)(
        target,
        word,
        overwrite=overwrite,
        inputs=inputs,
        names=names,
        written=written,
        permissions=permissions,
    )


def unfinished(target: str) -> tuple[Output, ...]:
    """The unfinished outputs of the URI `target` that `join` has made, the newest last."""
    return tuple(scheme_of(target).unfinished(target))


def identity_anywhere(store: Source, path: str) -> tuple[str | int, ...]:
    """What tells a file from any other, as all machines see it: inodes of shared folders may differ between them."""
    return store.identity_anywhere(path) if isinstance(store, LocalStore) else store.identity(path)


def require_space(target: str, nbytes: int) -> None:
    """Raises: StorageError: `nbytes` bytes have no room where `target` will be."""
    scheme_of(target).require_space(target, nbytes)


def permissions_for(sources: Iterable[tuple[object, Iterable[str]]], target: str) -> int:
    """The mode bits that an output made from these files may have; see `local.targets.permissions_for`."""
    return folder_permissions(sources, target) if scheme_of(target).modes else ANYONE
