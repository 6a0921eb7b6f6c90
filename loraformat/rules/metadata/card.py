"""Family 5, second part: the model card, and what should not be published with an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from loraformat.diagnostics import FindingLocation, Severity, in_file, show
from loraformat.errors import InvalidYaml
from loraformat.model.bundle import CARD, Bundle, File, Json, TensorFile
from loraformat.rules.base import Hit, Subject, rule

_MOST_BYTES = 1 << 20
_TEXTS = (".md", ".json", ".txt", ".yaml", ".yml", ".jinja", ".toml", ".py", ".cfg", ".ini", ".sh")
_LARGE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
_PLAIN = re.compile(r"([A-Za-z_]+): +([A-Za-z][A-Za-z0-9_./\-]*) *")
# What YAML reads as something else than text.
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_REPOSITORY = re.compile(r"\w[\w.\-]*(?:/\w[\w.\-]*)?")
_PATH = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:\\\\?Users\\\\?)[\w.\-]{1,64}")
# Prefixes that their issuers document so that scanners can find them.
_CREDENTIALS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b")),
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("an API key", re.compile(r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_\-]{32,}\b")),
    ("a Weights & Biases key", re.compile(r"(?i)wandb[_\-]?api[_\-]?key\W{1,4}[0-9a-f]{40}\b")),
)


@rule("LF502", Severity.INFO, since="0.1.0")
def card_without_base(subject: Subject) -> Iterator[Hit]:
    """The model card does not name a `base_model`.

    ## Why it matters
    Only with that field does the Hub link an adapter to its base, where people find it.

    ## Example
    README.md with `license:` but no `base_model:` in its front matter.

    ## What to do
    Write `base_model: meta-llama/Llama-3.1-8B` between the `---` lines at the top, or run `loraformat card`.

    ## Source
    huggingface/hub-docs, model-cards.md, "Specifying a base model".
    """
    card = front_matter(subject.bundle)
    if card is not None and "base_model" not in card:
        yield Hit(in_file(CARD, "base_model"), "expected the name of a model, found none")


@rule("LF503", Severity.INFO, since="0.1.0")
def card_without_license(subject: Subject) -> Iterator[Hit]:
    """The model card does not state a license.

    ## Why it matters
    Strictly speaking, nobody may use the adapter without one; the license of its base applies anyway.

    ## Example
    README.md whose front matter has no `license:`.

    ## What to do
    Write `license: apache-2.0`, or the license of the base model.

    ## Source
    huggingface/hub-docs, model-cards.md, "Specifying a license".
    """
    card = front_matter(subject.bundle)
    if card is not None and "license" not in card:
        yield Hit(in_file(CARD, "license"), "expected the name of a license, found none")


@rule("LF507", Severity.WARNING, since="0.1.0", publishing=True)
def card_disagreement(subject: Subject) -> Iterator[Hit]:
    """The model card names a different base model than the config.

    ## Why it matters
    One of the two is wrong; programs follow the config while people follow the card.

    ## Example
    `base_model: meta-llama/Llama-3.1-8B-Instruct` and `"base_model_name_or_path": "meta-llama/Llama-3.1-8B"`.

    ## What to do
    Write the model that the adapter was trained on in both places.

    ## Source
    huggingface/hub-docs, model-cards.md; peft 0.21.2, peft_model.py `create_or_update_model_card`.
    """
    assert subject.adapter is not None
    card, named = front_matter(subject.bundle) or {}, subject.adapter.config.base_model
    stated = first_text(card.get("base_model"))
    if named and stated and stated.lower() != named.lower():
        yield Hit(in_file(CARD, "base_model"), f'the card names "{stated}", but the config "{named}"')


@rule("LF512", Severity.WARNING, since="0.1.0", publishing=True)
def card_metadata(subject: Subject) -> Iterator[Hit]:
    """The front matter of the model card is not valid YAML, or a field has a value that the Hub rejects.

    ## Why it matters
    The Hub rejects the commit, or shows the repository without its base model, license and library.

    ## Example
    `base_model: ./llama`, which is a path, or `base_model_relation: lora`.

    ## What to do
    Write `base_model: owner/name`; `base_model_relation` must be adapter, merge, quantized or finetune, and `tags` a
    list. `loraformat card` writes all of them.

    ## Source
    huggingface/hub-docs, model-cards.md and its modelcard.md; huggingface_hub 2.4.0, `ModelCardData`.
    """
    text = _card(subject.bundle)
    if text is None:
        return
    try:
        fields = fields_of(text)
    except InvalidYaml as error:
        yield Hit(in_file(CARD), error.message)
        return
    for key, message in faults_of(fields):
        yield Hit(in_file(CARD, key), message)


@rule("LF508", Severity.INFO, since="0.1.0")
def personal_path(subject: Subject) -> Iterator[Hit]:
    """Files or metadata contain the path of somebody's home folder.

    ## Why it matters
    It publishes a user name and the layout of a machine, and the path does not exist anywhere else.

    ## Example
    `"ss_train_data_dir": "/home/ana/photos"` in the metadata of a safetensors file.

    ## What to do
    Remove it before publishing.

    ## Source
    kohya_ss issues 976 and 3363.
    """
    for where, text in _texts(subject):
        found = _PATH.search(text)
        if found:
            yield Hit(where, f'contains the personal path "{found[0]}"', "remove it before publishing")


@rule("LF509", Severity.WARNING, since="0.1.0", publishing=True)
def leaked_credential(subject: Subject) -> Iterator[Hit]:
    """A file or the metadata contains what looks like an access token.

    ## Why it matters
    Whoever can read the adapter can use the token. It stays in the history of a repository even after the file is
    removed.

    ## Example
    `hf_…` in a training argument that a trainer wrote into the metadata.

    ## What to do
    Revoke the token now, then remove it from the file.

    ## Source
    The prefixes that Hugging Face, GitHub, AWS and OpenAI document for secret scanners.
    """
    for where, text in _texts(subject):
        for kind, pattern in _CREDENTIALS:
            found = pattern.search(text)
            if found:
                yield Hit(where, f"{kind}, beginning with {found[0][:6]}", "revoke it, then remove it")


@rule("LF510", Severity.WARNING, since="0.1.0")
def added_tokens_disagreement(subject: Subject) -> Iterator[Hit]:
    """added_tokens.json and tokenizer.json give one token different numbers.

    ## Why it matters
    Slow and fast tokenizers read different files, so the same text gets different token numbers, one of them without a
    trained row.

    ## Example
    `"<tool>": 32001` in added_tokens.json, but 32000 in tokenizer.json.

    ## What to do
    Save both files with one `tokenizer.save_pretrained(…)`.

    ## Source
    transformers 5.23.0, tokenization_utils_base.py `added_tokens.json`.
    """
    from loraformat.rules.metadata.vocabulary import added_numbers

    added = added_numbers(subject.bundle, "added_tokens.json")
    full = added_numbers(subject.bundle, "tokenizer.json") if added else {}
    for token, number in sorted(added.items()):
        if full.get(token, number) != number:
            yield Hit(in_file("added_tokens.json", token), f"id {number} here, but id {full[token]} in tokenizer.json")
            return


def front_matter(bundle: Bundle) -> Mapping[str, Json] | None:
    """The fields at the top of the model card; None without a card, {} where they cannot be read."""
    text = _card(bundle)
    if text is None:
        return None
    try:
        return fields_of(text)
    except InvalidYaml:
        return {}


def _card(bundle: Bundle) -> str | None:
    file = bundle.files.get(CARD)
    if file is None or isinstance(file, TensorFile) or file.nbytes > _MOST_BYTES:
        return None
    return file.read().decode("utf-8", "replace")


def lines_of(text: str) -> list[str] | None:
    """The lines of the front matter of a card, between its two `---`; None where it has none."""
    lines = text.split("\n")  # what else ends a line in Unicode may stand in a line that a person wrote
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    return lines[1:end] if lines and lines[0].rstrip() == "---" and end is not None else None


def fields_of(text: str) -> Mapping[str, Json]:
    """The front matter of a card. Raises: InvalidYaml (LF009): it is not a mapping of YAML."""
    lines = lines_of(text) or ()
    plain = _plain_fields(lines)
    if plain is not None:
        return plain
    from loraformat import strict_yaml

    value = strict_yaml.parse("\n".join(lines).encode("utf-8", "replace"), CARD)
    if value is not None and not isinstance(value, dict):
        raise InvalidYaml("the front matter is not a mapping", where=CARD, hint="write `key: value` lines")
    return value or {}


def _plain_fields(lines: Sequence[str]) -> Mapping[str, Json] | None:
    """Fields of one word each, as most cards have them, without a library; None where there is anything else."""
    found: dict[str, Json] = {}
    for line in lines:
        match = _PLAIN.fullmatch(line.removesuffix("\r"))
        if match is None or match[1] in found or match[2].lower() in _WORDS:
            return None
        found[match[1]] = match[2]
    return found


def is_repository(name: str) -> bool:
    """Whether a text has the form of a repository's name with its owner."""
    return "/" in name and _REPOSITORY.fullmatch(name) is not None


def first_text(value: Json) -> str:
    """A field that is a text, or a list of texts: the first; "" for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""


def faults_of(fields: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for fields of a front matter whose values the Hub does not take."""
    for key in ("base_model", "license", "language"):
        value = fields.get(key)
        several = value if isinstance(value, list) else [value]
        if key in fields and not (several and all(isinstance(each, str) and each.strip() for each in several)):
            yield key, f"expected a name, or a list of names, found {show(json.dumps(value), 60)}"
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if key in fields and not isinstance(fields[key], str):
            yield key, f"expected a string, found {show(json.dumps(fields[key]), 60)}"
    tags = fields.get("tags", [])
    if not (isinstance(tags, list) and all(isinstance(each, str) for each in tags)):
        yield "tags", f"expected a list of strings, found {show(json.dumps(tags), 60)}"
    relation = fields.get("base_model_relation")
    if "base_model_relation" in fields and relation not in _RELATIONS:
        yield "base_model_relation", f"expected {', '.join(_RELATIONS)}, found {show(json.dumps(relation), 60)}"
    names = fields.get("base_model")
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and name.strip() and _REPOSITORY.fullmatch(name) is None:
            yield "base_model", f'expected the name of a repository, "owner/name", found "{show(name, 60)}"'


def _texts(subject: Subject) -> Iterator[tuple[FindingLocation, str]]:
    """(place, text) of every small text file, and of the metadata of the weight files."""
    for name, file in subject.bundle.files.items():
        if name.endswith(".safetensors"):
            yield from _metadata(file)
        elif isinstance(file, TensorFile):
            continue  # a pickle has no metadata, and may be none of ours to open
        elif name.lower().endswith(_TEXTS) and file.nbytes <= _MOST_BYTES and name not in _LARGE:
            yield in_file(name), file.read().decode("utf-8", "replace")


def _metadata(file: File) -> Iterator[tuple[FindingLocation, str]]:
    from loraformat.errors import LoraFormatError

    assert isinstance(file, TensorFile)
    try:
        metadata = file.open().metadata
    except LoraFormatError:  # a file that no format reads
        return
    for key, value in metadata.items():
        yield in_file(file.name, "__metadata__", show(key, 60)), value[:_MOST_BYTES]
