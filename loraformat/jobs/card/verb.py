"""card: the model card of an output, alone."""

from __future__ import annotations

import os

from loraformat.diagnostics import Finding
from loraformat.errors import ConfigError, UsageError
from loraformat.jobs.card.facts import Origin, facts_of, fields_of_card, name_of
from loraformat.jobs.card.text import rendered
from loraformat.model.bundle import CARD, Bundle, RawFile
from loraformat.model.results.verbs import CardResult
from loraformat.report import Report
from loraformat.rules import Subject
from loraformat.rules.metadata.card import card_metadata, card_without_base, card_without_license
from loraformat.storage import Location, is_hub, open_store, uri_of, uri_or_none, write_to

_MOST_NBYTES = 1 << 20


def card(
    path: Location,
    out: Location | None = None,
    *,
    base: Location | None = None,
    name: str | None = None,
) -> Report:
    """The model card of an adapter, a merged or a quantized model; into the file `out`, or as text in the report.

    >>> import loraformat
    >>> report = loraformat.card("fixtures/good/peft/tiny-llama", name="acme/tiny-lora")
    >>> print("".join(report.data.text.splitlines(keepends=True)[:5]), end="")
    ---
    base_model:
    - loraformat/tiny-llama
    base_model_relation: adapter
    library_name: peft

    The front matter and a marked part are written; what a person wrote around that part, and fields that a person set,
    stay. The same files and the same card give the same card.

    Args:
        path: folder or address of the Hub.
        out: a file, whose text is kept around the marked part if it is there; None to write none.
        base: the base: its address on the Hub is named, and its license, language and task are those of the card.
        name: "owner/name" under which others load it; by default that of the address, or of the folder.

    Raises: FormatError: neither a model nor an adapter. InvalidYaml (LF009): the front matter of the card that is there
        cannot be read. ConfigError (LF103): it has a value that the Hub does not take. StorageError.
    """
    uri, target = uri_of(path), uri_or_none(out)
    if target is not None and is_hub(target):
        raise UsageError("a card alone is written into a file", where="-o", hint="upload it with `hf upload`")
    store = open_store(uri)
    origin = Origin() if base is None else _origin(uri_of(base))
    existing = _text(target) if target is not None and os.path.exists(target) else None
    if existing is None and store.files().get(CARD, _MOST_NBYTES + 1) <= _MOST_NBYTES:
        existing = store.read(CARD).decode("utf-8", "replace")
    facts = facts_of(store, origin)
    text = rendered(facts, name or name_of(uri), existing)
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
    data = text.encode("utf-8", "replace")
    subject = Subject(bundle=Bundle(uri, {CARD: RawFile(CARD, len(data), lambda: data)}), format="")
    for hit in card_metadata.check(subject):
        raise ConfigError(hit.message, where=hit.location, hint="correct it in the card, or remove the field")
    return tuple(each.finding(hit) for each in (card_without_base, card_without_license) for hit in each.check(subject))


def _origin(base: str) -> Origin:
    return Origin(base=base, base_fields=fields_of_card(open_store(base)))


def _text(path: str) -> str:
    folder, name = os.path.split(path)
    return open_store(folder or ".").read(name, 0, _MOST_NBYTES + 1).decode("utf-8", "replace")
