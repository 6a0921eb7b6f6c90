"""A card as text: front matter, a part that this package writes, and all that a person wrote around it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from loraformat._version import __version__
from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError, StorageError
from loraformat.jobs.card import front_matter
from loraformat.jobs.card.escaping import code, heading
from loraformat.jobs.card.facts import Facts, UsedAdapter, sequence
from loraformat.jobs.card.loading import snippets
from loraformat.model.bundle import CARD
from loraformat.rules.metadata.card import faults_of, first_text, is_repository
from loraformat.strict_json import Json

_BEGIN = re.compile(r"<!-- loraformat:begin((?: [a-z_]{1,40}=[0-9a-f]{8}){0,40}) -->\s*")
_END = "<!-- loraformat:end -->"
_MOST_TARGETS = 12


def rendered(facts: Facts, name: str, existing: str | None = None) -> str:
    """The text of a card; the same facts and the same existing card give the same text.

    Args:
        name: of the output: its repository, or its folder.
        existing: the card that is there. What stands outside of the part of ours stays, and so do the fields of the
            front matter that a person set.

    Raises: InvalidYaml (LF009): the front matter of the existing card cannot be read.
    """
    card = front_matter.parse(existing or "")
    stated = first_text(card.fields.get("base_model"))
    if not facts.base and is_repository(stated):
        facts = replace(facts, base=stated, base_label=stated)
    before, above, below = _parts(card.body)
    lines, owned = front_matter.merged(card, _fields(facts), before)
    marks = "".join(f" {key}={digest}" for key, digest in sorted(owned.items()))
    part = "\n".join([f"<!-- loraformat:begin{marks} -->", *_body(facts, name), _END])
    body = "\n\n".join(each for each in (above, part, below) if each)
    return "\n".join(["---", *lines, "---", "", body, ""])


def decoded(card: bytes, where: str) -> str:
    """A card that is there, as text. Raises: StorageError: not UTF-8, so that what it says could not be kept."""
    try:
        return card.decode("utf-8")
    except UnicodeDecodeError as error:
        text = f"not text in UTF-8 (byte {error.start}), as a card must be"
        raise StorageError(text, where=where, hint="save it as UTF-8, or remove it") from None


def check_fields(text: str) -> None:
    """Raises: ConfigError (LF103): a card has a field that the Hub does not take. InvalidYaml (LF009): see `parse`."""
    for key, message in faults_of(front_matter.parse(text).fields):
        hint = "correct it in the card, or remove the field"
        raise ConfigError(message, where=in_file(CARD, key), hint=hint)


def _parts(body: str) -> tuple[dict[str, str], str, str]:
    """Which fields an earlier run wrote, and the text above and below its part.

    In a card without such a part all text stands below.
    """
    lines = body.split("\n")
    begin = next((number for number, line in enumerate(lines) if _BEGIN.fullmatch(line)), None)
    if begin is None:
        return {}, "", body.strip("\n")
    end = next((number for number in range(begin, len(lines)) if lines[number].strip() == _END), begin)
    match = _BEGIN.fullmatch(lines[begin])
    fields = dict(each.split("=") for each in (match[1].split() if match else ()))
    return fields, "\n".join(lines[:begin]).strip("\n"), "\n".join(lines[end + 1 :]).strip("\n")


def _fields(facts: Facts) -> dict[str, Json]:
    found: dict[str, Json] = {}
    if facts.base:
        found["base_model"] = [facts.base]
        if facts.relation:
            found["base_model_relation"] = facts.relation
    if facts.library:
        found["library_name"] = facts.library
    inherited = {key: _plain(value) for key, value in facts.fields.items()}
    found |= {key: value for key, value in inherited.items() if value and not any(faults_of({key: value}))}
    if facts.pipeline_tag:
        found["pipeline_tag"] = facts.pipeline_tag
    return {**found, "tags": list(facts.tags)}


def _plain(value: Json) -> Json:
    """A text or a list of texts; "" for anything else, which the Hub would not take."""
    if isinstance(value, str):
        return value
    found: list[Json] = [*front_matter.texts(value)] if isinstance(value, list) else []
    return found or ""


def _body(facts: Facts, name: str) -> Iterator[str]:
    yield f"# {heading(name)}"
    yield ""
    yield _about(facts)
    yield ""
    if facts.origin.adapters and facts.relation != "adapter":
        yield "## Merged adapters"
        yield ""
        yield from (f"- {_used(each)}" for each in facts.origin.adapters)
        yield ""
    notes = list(_notes(facts, name))
    if notes:
        yield "## Details"
        yield ""
        yield from (f"- {note}" for note in notes)
        yield ""
    yield "## Usage"
    yield ""
    for program, language, lines in snippets(facts, name):
        yield from (f"**{program}**", "", f"```{language}", *lines.splitlines(), "```", "")


def _about(facts: Facts) -> str:
    base = code(facts.base_label) if facts.base_label else ""
    link = f"[{base}](https://huggingface.co/{facts.base})" if facts.base else base
    tool = f"[loraformat](https://pypi.org/project/loraformat/) {__version__}"
    made = f", {facts.origin.made}" if facts.origin.made else ""
    if facts.relation == "adapter":
        return f"An adapter{link and f' for {link}'}{made}, in the format {code(facts.format)}. Written by {tool}."
    if facts.origin.adapters:
        count = len(facts.origin.adapters)
        what = "an adapter" if count == 1 else f"{count} adapters"
        return f"{link or 'A model'} with {what} merged into it: W + Σ s·ΔW, rounded once. Written by {tool}."
    return f"A model{link and f' made from {link}'}{made}. Written by {tool}."


def _used(adapter: UsedAdapter) -> str:
    name = code(adapter.name)
    named = f"[{name}](https://huggingface.co/{adapter.name})" if adapter.is_on_the_hub else name
    words = [named, f"strength {adapter.strength:g}"]
    if adapter.ranks:
        words.append(f"{'rank' if len(adapter.ranks) == 1 else 'ranks'} {sequence(adapter.ranks)}")
    if adapter.targets:
        words.append(f"targets {_listed(adapter.targets)}")
    return ", ".join(words)


def _notes(facts: Facts, name: str) -> Iterator[str]:
    origin, summary = facts.origin, facts.summary
    if summary is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.update_kinds.items())
        yield f"Updates: {kinds}; {summary.parameters:,} parameters"
        if summary.ranks:
            yield f"{'Rank' if len(summary.ranks) == 1 else 'Ranks'}: {sequence(tuple(summary.ranks))}"
        if summary.module_kinds:
            yield f"Targets: {_listed(tuple(summary.module_kinds))}"
        if facts.relation == "adapter" and origin.adapters:
            yield f"Made from: {'; '.join(_used(each) for each in origin.adapters)}"
    if origin.retained is not None:
        yield f"Retained after rounding: {origin.retained:.2%} of the update"
    if facts.scheme:
        yield f"Quantized: {code(facts.scheme)}"
    if facts.merges_before:
        yield f"Earlier merges in the base: {facts.merges_before}"
    if facts.manifest:
        address = code(f"loraformat verify hf://{name}") if "/" in name else code("loraformat verify")
        yield f"Manifest: {code('loraformat.manifest.json')}, SHA-256 {code(facts.manifest)}; {address} checks it"


def _listed(names: tuple[str, ...]) -> str:
    shown = [code(each) for each in names[:_MOST_TARGETS]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
