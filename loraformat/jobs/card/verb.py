"""card: the model card of an output, alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loraformat.diagnostics import Finding
from loraformat.errors import StorageError, UsageError
from loraformat.jobs.card.facts import Origin, facts_of, fields_of_card, name_of
from loraformat.jobs.card.text import check_fields, decoded, rendered
from loraformat.merger.write.manifest import read_manifest
from loraformat.model.bundle import CARD, Bundle, OpenedFiles, RawFile
from loraformat.model.results.verbs import CardResult
from loraformat.report import Report
from loraformat.rules import Subject
from loraformat.rules.metadata.card import card_without_base, card_without_license, fields_of
from loraformat.storage import Location, is_hub, is_local, is_own_stream, open_store, uri_of, uri_or_none, write_to
from loraformat.storage.platform import is_same_file

_MOST_NBYTES = 1 << 20


def card(
    path: Location,
    out: Location | None = None,
    *,
    base: Location | None = None,
    name: str | None = None,
) -> Report:
    """Write the model card of an adapter, a merged or a quantized model into the file `out`, or as text into the
    report.

    >>> import loraformat
    >>> report = loraformat.card("fixtures/good/peft/tiny-llama", name="acme/tiny-lora")
    >>> print("".join(report.data.text.splitlines(keepends=True)[:5]), end="")
    ---
    base_model:
    - loraformat/tiny-llama
    base_model_relation: adapter
    library_name: peft

    Only the front matter and a marked part are written; text around that part, and fields that a person set, stay. The
    same files and the same existing card give the same card.

    Args:
        path: folder or address of the Hub.
        out: a file; if it exists, its text around the marked part is kept. None to write no file.
        base: the base; the card takes over its name on the Hub, its license, language and task.
        name: "owner/name" under which others load it; by default that of the address, or of the folder.

    Raises: FormatError: neither a model nor an adapter. InvalidYaml (LF009): the front matter of the existing card
        cannot be read. ConfigError (LF103): it has a value that the Hub rejects. StorageError: `out` exists and is not
        a card in UTF-8.
    """
    uri, target = uri_of(path), uri_or_none(out)
    if target is not None and not is_local(target):
        hint = "upload it with `hf upload`" if is_hub(target) else "write a file, and copy it there"
        raise UsageError("a card alone can only be written to a local file", where="-o", hint=hint)
    store = open_store(uri)
    if target is not None:
        _check_target(target, uri, store)
    origin = Origin() if base is None else _origin(uri_of(base))
    existing = _text(store, target)
    if existing is not None and _is_of_the_base(existing, read_manifest(store)):
        known = fields_of(existing.decode("utf-8", "replace"))
        origin, existing = replace(origin, base_fields={**known, **origin.base_fields}), None
    facts = facts_of(store, origin)
    there = None if existing is None else decoded(existing, target or uri)
    text = rendered(facts, name or name_of(uri), there)
    findings = _checked(uri, text)
    if target is not None:
        write_to(target, text.encode("utf-8"))
    return Report(
        job="card",
        subject=uri,
        data=CardResult(relation=facts.relation, text=text),
        findings=findings,
        written=() if target is None else (target,),
    )


def _checked(uri: str, text: str) -> tuple[Finding, ...]:
    """What `validate` finds in the card. Raises: ConfigError (LF103): a field that the Hub does not take."""
    check_fields(text)
    data = text.encode("utf-8", "replace")
    subject = Subject(bundle=Bundle(uri, {CARD: RawFile(CARD, len(data), lambda: data)}), format="")
    return tuple(each.finding(hit) for each in (card_without_base, card_without_license) for hit in each.check(subject))


def _origin(base: str) -> Origin:
    return Origin(base=base, base_fields=fields_of_card(open_store(base)))


def _check_target(target: str, uri: str, store: OpenedFiles) -> None:
    """Raises: StorageError: a file is there that is not a card, or that the subject is read from."""
    if not _is_file(target):
        return
    if not os.path.realpath(target).lower().endswith(".md"):
        text = "the file exists and is not a model card: its name does not end in .md"
        raise StorageError(text, where=target, hint="name another file, or remove this one first")
    read = [os.path.join(uri, name) for name in store.files() if name != CARD] if is_local(uri) else []
    if any(os.path.exists(path) and _is_same(path, target) for path in (uri, *read)):
        raise StorageError("the card would replace a file of the model it describes", where=target)


def _is_same(one: str, other: str) -> bool:
    """Whether two paths lead to one file, by identity, and by path where files have none."""
    paths = {os.path.normcase(os.path.realpath(path)) for path in (one, other)}
    return len(paths) == 1 or is_same_file(os.stat(one), os.stat(other))


def _is_file(target: str) -> bool:
    """Whether a file with something in it is there, other than one that our own output goes into."""
    return os.path.isfile(target) and os.path.getsize(target) > 0 and not is_own_stream(target)


def _text(store: OpenedFiles, target: str | None) -> bytes | None:
    """The card that is there: the file that is to be written, else the one among the files of the output."""
    name = CARD
    if target is not None and _is_file(target):
        name, store = os.path.basename(os.path.realpath(target)), open_store(os.path.realpath(target))
    if name not in store.files():
        return None
    if store.size(name) > _MOST_NBYTES:
        raise StorageError(f"{store.size(name)} bytes, at most {_MOST_NBYTES} are read", where=target or store.uri)
    return store.read(name)


def _is_of_the_base(card: bytes, manifest: Mapping[str, Any] | None) -> bool:
    """Whether a card is the base's, which a merge copies beside a model that it does not describe."""
    files = manifest["base"]["files"] if manifest is not None else ()
    digest = hashlib.sha256(card).hexdigest()
    return any(each["name"] == CARD and each.get("sha256") == digest for each in files)
