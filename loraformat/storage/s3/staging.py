"""An output under a prefix that appears complete or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.faults import refuse_existing
from loraformat.storage.local.interrupts import Deferral
from loraformat.storage.s3.address import SCHEME, Address, parsed, parsed_location
from loraformat.storage.s3.client import Client, as_storage_error, connected, suppress_conflict
from loraformat.storage.s3.leftovers import (
    Left,
    clear,
    look,
    record_of,
    refuse_inner,
    remove_if_same,
    unfinished_files,
    uploaded_nbytes,
)
from loraformat.storage.s3.locks import check_unlocked, locked
from loraformat.storage.s3.outputs import Making, S3Output
from loraformat.storage.s3.publish import PublishedOutput, clear_up, discard
from loraformat.storage.s3.records import ALIVE, OUTPUT, OutputRecord, own_name, parsed_name
from loraformat.storage.s3.requests import put_object
from loraformat.storage.s3.store import Listed

_WORD_CHARACTERS = 16


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
) -> Iterator[S3Output]:
    """An output whose files appear under the prefix `target` when the block ends without exception.

    Large files are uploads, which nobody sees, until the block ends or `seal` completes them; small ones wait in
    memory. What describes the others (config.json, an index) is put last, the manifest after all. Old files that are
    replaced stay until the new ones are complete and checked beside them. On any exception, KeyboardInterrupt too,
    everything that was made is removed. A run that was killed leaves uploads and objects of its own; the next run to
    the same place finds them by their names and removes them, and no others.

    Args: as of `local.staging.stage`.

    Raises: StorageError: something stands there that may not be replaced, another run is writing there, or nothing
        can be written there.
    """
    check(target, overwrite=overwrite, names=names, written=written)
    address, client = _output_address(target), connected()
    with Deferral() as signals, locked(client, address) as lock:
        left = look(client, address)
        _refuse_alive(client, address, left)
        old = _existing(client, address, left, overwrite, names, written)
        kept = _kept(client, address, left, old, resume=resume, word=word)
        cleared = _clear_others(client, address, left, kept)
        if cleared and on_cleared is not None:
            on_cleared(cleared)
        chosen, record = (kept, record_of(client, address, left, kept)) if kept else (os.urandom(8).hex(), None)
        record = record or OutputRecord(replaces=bool(old), old=tuple(old))
        making = _making(client, chosen, record, inputs, is_shared=False, resumes=bool(kept))
        output = S3Output(address, making, permissions)
        publication = PublishedOutput(output, record, old)
        try:
            _note(client, address, chosen, record)
            if kept:
                output.load()
            with signals.delivered():
                yield output
            lock.check()
            publication.run()
        except BaseException as error:
            making.workers.close()
            is_kept = word is not None or (resume and not isinstance(error, Exception))
            _give_up(publication, is_kept=is_kept)
            raise
        making.workers.close()
        clear_up(output)


@contextmanager
def join(
    target: str,
    word: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
    permissions: int = 0o777,
) -> Iterator[S3Output]:
    """An unfinished output of `target` to which several processes upload files at a time; see `local.staging.join`.

    What each of them uploads it notes in an object beside the output, where `stage` with the same word finds it. Of a
    file that two of them upload, the note that was written last is the one that holds.
    """
    address, client, short = _output_address(target), connected(), _short(word)
    with locked(client, address, own_name(short, ALIVE, os.urandom(8).hex())):
        check_unlocked(client, address)
        left = look(client, address)
        old = _existing(client, address, left, overwrite, names, written)
        new = OutputRecord(is_shared=True, replaces=bool(old), old=tuple(old))
        record = record_of(client, address, left, short) or new
        making = _making(client, short, record, inputs, is_shared=True, resumes=True)
        output = S3Output(address, making, permissions)
        try:
            with as_storage_error(address.uri), suppress_conflict():
                key = address.key(own_name(short, OUTPUT))
                put_object(client, address.bucket, key, record.to_bytes(), IfNoneMatch="*")
            output.load()
            yield output
        finally:
            making.workers.close()


def reopened(location: str) -> S3Output:
    """An unfinished output by its `location`, to upload files to it from another process.

    Raises: StorageError: there is none.
    """
    (address, word), client = parsed_location(location), connected()
    record = record_of(client, address, look(client, address), word)
    if record is None:
        raise StorageError("there is no unfinished output", where=address.uri)
    return S3Output(address, _making(client, word, record, (), is_shared=True, resumes=False), 0o777)


def unfinished(target: str) -> Iterator[S3Output]:
    """The unfinished outputs of `target` that `join` has made. Raises: StorageError: the prefix cannot be listed."""
    address, client = _output_address(target), connected()
    left = look(client, address)
    for word in sorted(left.own):
        record = record_of(client, address, left, word)
        if record is not None and record.is_shared:
            output = S3Output(address, _making(client, word, record, (), is_shared=True, resumes=True), 0o777)
            output.load()
            for folder in sorted({path.rpartition("/")[0] for path in left.own[word]} - {""}):
                with output.subfolder(folder):
                    pass
            yield output


def _output_address(target: str) -> Address:
    address = parsed(target)
    if not address.path:
        hint = f"{address.uri}/NAME"
        raise StorageError("an output needs a prefix: a whole bucket is never written to", where=target, hint=hint)
    return address


def _short(word: str) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{_WORD_CHARACTERS},}}", word):
        raise ValueError(word)
    return word[:_WORD_CHARACTERS]


def check(
    target: str,
    *,
    overwrite: bool,
    inputs: Sequence[str] = (),  # noqa: ARG001 - compared as addresses, see `storage.refuse_inputs`
    names: Collection[str] = (),
    written: Callable[[str], Collection[str]] | None = None,
) -> None:
    """Raises: StorageError: something stands at `target` that a run with these arguments may not replace."""
    address, client = _output_address(target), connected()
    _existing(client, address, look(client, address), overwrite, names, written)


def _making(
    client: Client, word: str, record: OutputRecord, inputs: Sequence[str], *, is_shared: bool, resumes: bool
) -> Making:
    return Making(
        client=client,
        word=word,
        replaces=record.replaces,
        is_shared=is_shared,
        resumes=resumes,
        copies_base=bool(inputs) and inputs[0].lower().startswith(SCHEME),
    )


def _existing(
    client: Client,
    address: Address,
    left: Left,
    overwrite: bool,
    names: Collection[str],
    written: Callable[[str], Collection[str]] | None,
) -> dict[str, Listed]:
    """The files that stand there and will be replaced.

    Raises: StorageError: they may not, or unfinished outputs of others lie below the prefix.
    """
    refuse_inner(address, left)
    unfinished = unfinished_files(client, address, left)
    found = {name: known for name, known in left.files.items() if name not in unfinished}
    if not found:
        return {}
    ours = set() if written is None else set(written(address.uri))
    known = {*names, *ours}
    for word in left.own:
        record = record_of(client, address, left, word)
        known |= set() if record is None else {*record.old, *record.files}
    others = sorted(name for name in found if name not in known and (not ours or "/" in name))
    refuse_existing(address.uri, "prefix", others, overwrite=overwrite, names=names, written=written)
    return found


def _refuse_alive(client: Client, address: Address, left: Left) -> None:
    """Raises: StorageError: a process that shares an unfinished output is at work."""
    for name in (name for own in left.own.values() for name in own):
        kind = parsed_name(name)
        if kind is not None and kind[1] == ALIVE:
            check_unlocked(client, address, name)


def _kept(client: Client, address: Address, left: Left, old: Collection[str], *, resume: bool, word: str | None) -> str:
    """The word of the unfinished output that is gone on with; "" for none.

    Raises: StorageError: there is none of this word.
    """
    if word is not None:
        short = _short(word)
        if record_of(client, address, left, short) is None:
            hint = "run every rank first, with the same inputs and options"
            raise StorageError("no rank of this run has written anything there", where=address.uri, hint=hint)
        return short
    for each in sorted(left.own) if resume else ():
        record = record_of(client, address, left, each)
        if record is not None and not record.is_shared and not record.files and record.replaces == bool(old):
            return each
    return ""


def _clear_others(client: Client, address: Address, left: Left, kept: str) -> int:
    """Remove what other runs left unfinished; the bytes of it."""
    mine = Left(left.files, {word: own for word, own in left.own.items() if word == kept})
    theirs = Left(left.files, {word: own for word, own in left.own.items() if word != kept})
    spared = unfinished_files(client, address, mine)
    for name, known in unfinished_files(client, address, theirs).items():
        if name not in spared:
            remove_if_same(client, address, name, known)
    nbytes = uploaded_nbytes(client, address, theirs)
    clear(client, address, theirs, list(theirs.own))
    return nbytes


def _note(client: Client, address: Address, word: str, record: OutputRecord) -> None:
    with as_storage_error(address.uri):
        put_object(client, address.bucket, address.key(own_name(word, OUTPUT)), record.to_bytes())


def _give_up(publication: PublishedOutput, *, is_kept: bool) -> None:
    """Remove what a run made; where it `is_kept`, only what was put beside the files that were uploaded.

    Those that are complete stay, since their uploads are gone: weights without a config, an index and a manifest, which
    the next run recognizes by their records.
    """
    output = publication.output
    if not is_kept:
        discard(output, {} if publication.record.replaces else publication.placed)
        return
    client = output.making.client.hurried()
    for name, known in reversed(publication.placed.items()) if not output.making.replaces else ():
        with suppress(LoraFormatError):
            remove_if_same(client, output.address, name, known)
