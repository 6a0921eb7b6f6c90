"""Family 5, second part: the model card, and what should not be published with an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loraformat.diagnostics import FindingLocation, Severity, in_file, show
from loraformat.model.bundle import Bundle, File, TensorFile
from loraformat.rules.base import Hit, Subject, rule

CARD = "README.md"
_MOST_BYTES = 1 << 20
_TEXTS = (".md", ".json", ".txt", ".yaml", ".yml", ".jinja", ".toml", ".py", ".cfg", ".ini", ".sh")
_LARGE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
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
    """The model card names no `base_model`.

    ## Why is this bad?
    The Hub links an adapter to its base, and people find it there, only by that field.

    ## Example
    README.md whose front matter has `license:` and no `base_model:`.

    ## Use instead
    `base_model: meta-llama/Llama-3.1-8B` between the lines `---` at the top.

    ## Source
    huggingface/hub-docs, model-cards.md, "Specifying a base model".
    """
    card = front_matter(subject.bundle)
    if card is not None and "base_model" not in card:
        yield Hit(in_file(CARD, "base_model"), "expected the name of a model, found none")


@rule("LF503", Severity.INFO, since="0.1.0")
def card_without_license(subject: Subject) -> Iterator[Hit]:
    """The model card states no license.

    ## Why is this bad?
    Without one nobody may use the adapter, strictly speaking; and it is bound by the license of its base anyway.

    ## Example
    README.md whose front matter has no `license:`.

    ## Use instead
    `license: apache-2.0`, or the license of the base model.

    ## Source
    huggingface/hub-docs, model-cards.md, "Specifying a license".
    """
    card = front_matter(subject.bundle)
    if card is not None and "license" not in card:
        yield Hit(in_file(CARD, "license"), "expected the name of a license, found none")


@rule("LF507", Severity.WARNING, since="0.1.0", publishing=True)
def card_disagreement(subject: Subject) -> Iterator[Hit]:
    """The model card names another base model than the config.

    ## Why is this bad?
    One of the two is wrong, and programs follow the config while people follow the card.

    ## Example
    `base_model: meta-llama/Llama-3.1-8B-Instruct` and `"base_model_name_or_path": "meta-llama/Llama-3.1-8B"`.

    ## Use instead
    The model that the adapter was trained on, in both places.

    ## Source
    huggingface/hub-docs, model-cards.md; peft 0.21.2, peft_model.py `create_or_update_model_card`.
    """
    assert subject.adapter is not None
    card, named = front_matter(subject.bundle) or {}, subject.adapter.config.base_model
    stated = card.get("base_model", "")
    if named and stated and stated.lower() != named.lower():
        yield Hit(in_file(CARD, "base_model"), f'the card says "{stated}", the config "{named}"')


@rule("LF508", Severity.INFO, since="0.1.0")
def personal_path(subject: Subject) -> Iterator[Hit]:
    """Files or metadata hold the path of somebody's home folder.

    ## Why is this bad?
    It publishes a user name and the layout of a machine, and whatever reads the path finds nothing.

    ## Example
    `"ss_train_data_dir": "/home/ana/photos"` in the metadata of a safetensors file.

    ## Use instead
    Remove it before publishing.

    ## Source
    kohya_ss issues 976 and 3363.
    """
    for where, text in _texts(subject):
        found = _PATH.search(text)
        if found:
            yield Hit(where, f'the path "{found[0]}"', "remove it before publishing")


@rule("LF509", Severity.WARNING, since="0.1.0", publishing=True)
def leaked_credential(subject: Subject) -> Iterator[Hit]:
    """A file or the metadata holds something that looks like an access token.

    ## Why is this bad?
    Whoever can read the adapter can use the token. It stays in the history of a repository when the file is removed.

    ## Example
    `hf_…` in a training argument that a trainer wrote into the metadata.

    ## Use instead
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
    """added_tokens.json and tokenizer.json give one token two numbers.

    ## Why is this bad?
    Slow and fast tokenizers read different files, so the same text becomes different numbers, one of them without a
    trained row.

    ## Example
    `"<tool>": 32001` in added_tokens.json, 32000 in tokenizer.json.

    ## Use instead
    Both files from one `tokenizer.save_pretrained(…)`.

    ## Source
    transformers 5.23.0, tokenization_utils_base.py `added_tokens.json`.
    """
    from loraformat.rules.metadata.vocabulary import added_numbers

    added = added_numbers(subject.bundle, "added_tokens.json")
    full = added_numbers(subject.bundle, "tokenizer.json") if added else {}
    for token, number in sorted(added.items()):
        if full.get(token, number) != number:
            yield Hit(in_file("added_tokens.json", token), f"{number}, in tokenizer.json {full[token]}")
            return


def front_matter(bundle: Bundle) -> Mapping[str, str] | None:
    """The fields `key: value` at the top of the model card, without nested ones; None without a card."""
    file = bundle.files.get(CARD)
    if file is None or isinstance(file, TensorFile) or file.nbytes > _MOST_BYTES:
        return None
    lines = file.read().decode("utf-8", "replace").splitlines()
    fields: dict[str, str] = {}
    if not lines or lines[0].strip() != "---":
        return fields
    for line in lines[1:]:
        if line.strip() == "---":
            break
        found = re.match(r"([A-Za-z_]+):\s*(.*)", line)
        if found:
            fields[found[1]] = found[2].strip().strip("'\"")
    return fields


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
