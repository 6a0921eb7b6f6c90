"""An output on the Hub, published in one commit or not at all."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from loraformat.errors import StorageError
from loraformat.storage.hub.connection import Connection
from loraformat.storage.hub.faults import as_hub_error
from loraformat.storage.hub.output import HubOutput
from loraformat.storage.hub.publish import Publisher
from loraformat.storage.hub.target import check_owner, earlier_output, look, parsed, refuse_moved
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.local.staging import require_space as require_local_space
from loraformat.storage.publication import Publication, Publishing

_SCHEME = "hf://"
_NO_RANKS = "let them write to a folder or bucket that all of them see, finish it, then upload it with `hf upload`"


@contextmanager
def stage(
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
    publishing: Publishing | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[HubOutput]:
    """An output of a repository: collected in a temporary folder, and committed when the block ends without exception.

    Args:
        target: hf://owner/name, with @branch and /folder if wanted; a repository or branch that is not there is made.
        overwrite: whether a repository that is not empty is written to; files of an earlier output of this package are
            removed then, all others stay.
        inputs, names, written: see `local.staging.stage`.
        resume, word: not supported.
        permissions, on_cleared: without meaning here.
        publishing: how it gets there.
        wait: how to pass some seconds before a request is made again.

    Raises: StorageError: it cannot be written there, somebody else wrote there meanwhile, or the Hub did not take it;
        nothing is visible then. UsageError: options that the Hub does not have.
    """
    del permissions, on_cleared
    if word is not None:
        raise StorageError(
            "several processes cannot share an unfinished output on the Hub", where=target, hint=_NO_RANKS
        )
    chosen = publishing or Publishing(Publication())
    address = parsed(target, chosen.options, resume=resume)
    with as_hub_error(target):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise StorageError("HF_HUB_OFFLINE is set: nothing is written to the Hub (offline)", hint="unset it")
        connection = Connection.open(wait=wait)
        place = look(connection, address)
        check_owner(connection, place, chosen.options)
    refuse_moved(place, inputs)
    ours = earlier_output(place, names or chosen.names, written, overwrite=overwrite)
    publisher = Publisher(connection, place, chosen, wait)
    publisher.check_access()
    with Deferral() as signals:
        folder = _new_folder(target)
        try:
            with signals.delivered():
                output = HubOutput(
                    folder,
                    address,
                    0o700,
                    reads_copies=not _is_on_the_hub(inputs[:1]),
                    before=address.at(place.state.commit) if place.state is not None and place.files() else None,
                )
                if chosen.on_opened is not None:
                    chosen.on_opened(output.previous)
                yield output
                published = publisher.publish(output, ours)
        finally:
            _remove_tree(folder)
    if chosen.on_published is not None:
        chosen.on_published(published)


def require_space(target: str, nbytes: int) -> None:
    """Raises: StorageError: the files of an output have no room on this machine, where they wait for the commit."""
    folder = tempfile.gettempdir()
    try:
        require_local_space(os.path.join(folder, "loraformat"), nbytes)
    except StorageError as error:
        text = f"{error.message} in {folder}, where the files wait for the commit"
        raise StorageError(text, where=target, hint="set TMPDIR to another folder") from error


def _is_on_the_hub(inputs: Sequence[str]) -> bool:
    return any(uri.lower().startswith(_SCHEME) for uri in inputs)


def _new_folder(target: str) -> str:
    try:
        return tempfile.mkdtemp(prefix="loraformat-hub-")
    except OSError as error:
        raise StorageError("cannot create a folder for temporary files", where=target, hint="set TMPDIR") from error


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
