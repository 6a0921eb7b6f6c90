"""Stores by URI scheme: how inputs are opened and outputs created."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraformat.diagnostics import show, show_address
from loraformat.errors import StorageError
from loraformat.storage.base import Join, Output, Stage, Store
from loraformat.storage.local.staging import join as _join_folder
from loraformat.storage.local.staging import require_space as _require_space
from loraformat.storage.local.staging import stage as _stage_folder
from loraformat.storage.local.staging import unfinished as _unfinished_folders
from loraformat.storage.local.store import LocalStore
from loraformat.storage.local.targets import checked as _check_folder
from loraformat.storage.publication import Publication, Publishing, check_publication

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of place.

    Attributes:
        open: the files at a URI. Raises StorageError: there are none.
        stage: makes an output at a URI; None where nothing can be written.
        check: raises StorageError where `stage` would refuse an output at a URI, given the same arguments; None where
            only the run itself finds out.
        require_space: raises StorageError where so many bytes have no room at a URI.
        modes: whether files there have mode bits that keep others from reading them.
        join: opens an unfinished output that several processes write; None where that is not possible.
        normalized: a URI in its one spelling; what lies below it begins with it and a slash. Raises StorageError: it is
            not an address.
        is_location: whether it names unfinished outputs, among the processes of a run, and never what a user gives.
        unfinished: those that are left at a URI, as far as they can be listed.
    """

    open: Callable[[str], Store]
    stage: Stage | None = None
    check: Callable[..., object] | None = None
    require_space: Callable[[str, int], None] = lambda uri, nbytes: None  # noqa: ARG005
    modes: bool = False
    join: Join | None = None
    normalized: Callable[[str], str] = lambda uri: uri.rstrip("/")
    unfinished: Callable[[str], Iterable[Output]] = lambda uri: ()  # noqa: ARG005
    is_location: bool = False


def _open_repository(uri: str) -> Store:
    from loraformat.storage.hub import open_repository

    return open_repository(uri)


def _stage_repository(target: str, **named: Any) -> AbstractContextManager[Output]:  # noqa: ANN401 - see `Stage`
    from loraformat.storage.hub import stage

    return stage(target, **named)


def _require_space_for_repository(uri: str, nbytes: int) -> None:
    from loraformat.storage.hub import require_space

    require_space(uri, nbytes)


def _open_local(uri: str) -> Store:
    if re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*(@[\w.\-]+)?", uri) and not os.path.lexists(uri):
        raise StorageError("no such file or folder", where=uri, hint=f"for the Hub, write hf://{uri}")
    return LocalStore(uri)


def _open_prefix(uri: str) -> Store:
    from loraformat.storage.s3.store import open_prefix

    return open_prefix(uri)


def _reopen_prefix(location: str) -> Store:
    from loraformat.storage.s3.staging import reopened

    return reopened(location)


def _stage_prefix(target: str, **options: Any) -> AbstractContextManager[Output]:  # noqa: ANN401 - those of Stage
    from loraformat.storage.s3.staging import stage

    return stage(target, **options)


def _check_prefix(target: str, **options: Any) -> None:  # noqa: ANN401 - those of `stage`
    from loraformat.storage.s3.staging import check

    check(target, **options)


def _join_prefix(target: str, word: str, **options: Any) -> AbstractContextManager[Output]:  # noqa: ANN401 - of Join
    from loraformat.storage.s3.staging import join

    return join(target, word, **options)


def _open_filesystem(uri: str) -> Store:
    from loraformat.storage.remote.filesystems import open_filesystem

    return open_filesystem(uri)


def _unfinished_prefixes(target: str) -> Iterable[Output]:
    from loraformat.storage.s3.staging import unfinished

    return unfinished(target)


def _normalized_prefix(uri: str) -> str:
    from loraformat.storage.s3.address import normalized

    return normalized(uri)


def _normalized_repository(uri: str) -> str:
    from loraformat.storage.hub import normalized

    return normalized(uri)


# By the scheme in lower case; "" for paths of this machine.
SCHEMES: dict[str, Scheme] = {
    "": Scheme(
        _open_local,
        _stage_folder,
        _check_folder,
        _require_space,
        modes=True,
        join=_join_folder,
        normalized=os.path.realpath,
        unfinished=_unfinished_folders,
    ),
    "hf": Scheme(
        _open_repository,
        _stage_repository,
        require_space=_require_space_for_repository,
        normalized=_normalized_repository,
    ),
    "s3": Scheme(
        _open_prefix,
        _stage_prefix,
        _check_prefix,
        join=_join_prefix,
        normalized=_normalized_prefix,
        unfinished=_unfinished_prefixes,
    ),
    "s3+unfinished": Scheme(_reopen_prefix, is_location=True),
    **dict.fromkeys(("gs", "gcs", "az", "abfs", "abfss"), Scheme(_open_filesystem)),
}


def scheme_of(uri: str) -> Scheme:
    """The scheme of a URI. Raises StorageError: none of SCHEMES has this name."""
    found = _SCHEME.match(uri)
    name = found[1].lower() if found else ""
    if name not in SCHEMES:
        hint = "download it and pass the folder"
        raise StorageError(f"{name}:// is not supported in this version", where=show_address(uri), hint=hint)
    return SCHEMES[name]


def is_hub(uri: str) -> bool:
    """Whether a URI is an address of the Hub."""
    return uri.lower().startswith("hf://")


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return _SCHEME.match(uri) is None


def stage_of(uri: str, publishing: Publishing | None = None) -> Stage:
    """How an output is made at a URI, and gets onto the Hub where it is one of its addresses.

    Raises: StorageError: nothing can be written there. UsageError: options of the Hub for another kind of output.
    """
    if publishing is not None:
        check_publication(publishing.options, is_hub=is_hub(uri))
        if is_hub(uri):
            return partial(_stage_repository, publishing=publishing)
    stage = scheme_of(uri).stage
    if stage is None:
        raise StorageError(
            "outputs cannot be written there", where=show_address(uri), hint="write to a folder, s3:// or hf://"
        )
    return stage


def check_of(uri: str) -> Callable[..., object] | None:
    """How an output at a URI is checked before anything is written there; None where only writing it shows.

    Raises: StorageError: nothing can be written there.
    """
    stage_of(uri)
    return scheme_of(uri).check


def check_target(uri: str, options: Publication) -> None:
    """Raises: StorageError: nothing can be written at a URI. UsageError: options that do not go with it."""
    check_publication(options, is_hub=is_hub(uri))
    if is_hub(uri):
        from loraformat.storage.hub import target

        target.parsed(uri, options, resume=False)
    else:
        stage_of(uri)


def join_of(uri: str) -> Join:
    """How several processes write one output at a URI. Raises StorageError: they cannot."""
    join = scheme_of(uri).join
    if join is None:
        hint = "let them write to a folder or bucket that all of them see, finish it, then upload it with `hf upload`"
        raise StorageError("several processes cannot write one output there", where=uri, hint=hint)
    return join


def refuse_inputs(target: str, inputs: Sequence[str]) -> None:
    """Raises: StorageError: `target` is, contains, or lies inside one of the addresses that a run reads."""
    scheme = scheme_of(target)
    output = scheme.normalized(target)
    for given in inputs:
        if scheme_of(given) is not scheme:
            continue
        source = scheme.normalized(given)
        if output == source or _is_below(output, source) or _is_below(source, output):
            raise StorageError(f"the output is, contains, or lies inside the input {show(given)}", where=target)


def _is_below(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer.rstrip('/')}/")
