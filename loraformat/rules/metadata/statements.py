"""Family 5: metadata and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loraformat.diagnostics import Severity, in_file
from loraformat.errors import LoraFormatError
from loraformat.model.bundle import JsonFile
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import config_at
from loraformat.rules.metadata.vocabulary import faults_of, tokens_of
from loraformat.rules.shapes import base_rows, is_vocabulary_table, table_rows, updates_of

# Source: transformers 5.23.0, tokenization_utils_base.py; sentencepiece models are not JSON.
_TOKENIZER_FILES = frozenset(
    {
        *("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    }
)


@rule("LF501", Severity.WARNING, since="0.1.0", needs="base")
def base_model_disagreement(subject: Subject) -> Iterator[Hit]:
    """The adapter names a different base model than the one in use.

    ## Why it matters
    Many models of one family have the same shapes and names, so an adapter fits all of them but is right for only one.

    ## Example
    `"base_model_name_or_path": "meta-llama/Llama-3.1-8B"` used with a checkpoint whose config says
    `"_name_or_path": "meta-llama/Llama-3.1-8B-Instruct"`.

    ## What to do
    Use the base that the adapter names, or the adapter that was trained on this base.

    ## Source
    peft 0.21.2, config.py `base_model_name_or_path`; transformers 5.23.0, configuration_utils.py `_name_or_path`.
    """
    assert subject.adapter is not None
    assert subject.base is not None
    on_the_hub = re.match(r"hf://([^/@]+/[^/@]+)", subject.base.uri)
    given = on_the_hub[1] if on_the_hub else subject.base.config.get("_name_or_path")
    named = subject.adapter.config.base_model
    if isinstance(named, str) and isinstance(given, str) and _differ(named, given):
        yield Hit(config_at(subject), f'the adapter is for "{named}", but the base is "{given}"')


def _differ(named: str, given: str) -> bool:
    """Whether two names of the Hub differ; a path on somebody's disk says nothing about what lies there."""
    is_hub_name = all(name.count("/") == 1 and name[0] not in "./~" and "\\" not in name for name in (named, given))
    return is_hub_name and named.lower() != given.lower()


@rule("LF504", Severity.WARNING, since="0.1.0")
def tokens_without_tokenizer(subject: Subject) -> Iterator[Hit]:
    """The adapter has rows for new tokens, but no tokenizer that defines these tokens.

    ## Why it matters
    The new rows are addressed by token number. With the base's tokenizer they are never used; with another one, by the
    wrong words.

    ## Example
    `embedding_weights.safetensors` with 95 rows for a base of 77, but no `tokenizer.json`.

    ## What to do
    Save the tokenizer with the adapter: `tokenizer.save_pretrained(adapter_folder)`.

    ## Source
    transformers 5.23.0, tokenization_utils_base.py `save_pretrained`.
    """
    assert subject.adapter is not None
    if not subject.adapter.tokenizer:
        new = max(_new_rows(subject), default=0)
        if new > 0:
            yield Hit("", f"{new} new embedding rows, but no tokenizer file", "put tokenizer.json next to the adapter")


def _new_rows(subject: Subject) -> Iterator[int]:
    """Rows beyond the base's, as the config has them and as each table has them."""
    assert subject.adapter is not None
    config = subject.adapter.config
    if config.vocab_size is not None and config.base_vocab_size is not None:
        yield config.vocab_size - config.base_vocab_size
    for name, update in updates_of(subject.adapter):
        rows, before = table_rows(name, update), base_rows(subject.base, name)
        if rows is not None and before is not None:
            yield rows - before


@rule("LF505", Severity.ERROR, since="0.1.0", forgivable=True)
def malformed_tokenizer(subject: Subject) -> Iterator[Hit]:
    """A tokenizer.json is invalid: not JSON, no vocabulary, wrong or shared token numbers.

    ## Why it matters
    It would be copied next to the merged model, and the libraries that load it fail, some of them by crashing the
    process.

    ## Example
    Two tokens share the number 3.

    ## What to do
    Save the tokenizer with its library: `tokenizer.save_pretrained(…)`.

    ## Source
    tokenizers 0.22, tokenizers/src/tokenizer/serialization.rs, models/bpe/model.rs, normalizers/precompiled.rs.
    """
    assert subject.adapter is not None
    for name, fault in faults_of(subject.adapter.tokenizer):
        yield Hit(in_file(name), fault)


@rule("LF511", Severity.WARNING, since="0.1.0")
def unreadable_tokenizer_file(subject: Subject) -> Iterator[Hit]:
    """A tokenizer file is a folder, or is not JSON although its name says so.

    ## Why it matters
    A folder is not copied, and a file that does not parse breaks the tokenizer: the merged or converted model then has
    no tokenizer, or one that cannot be loaded.

    ## Example
    `tokenizer_config.json` that was cut short by a full disk.

    ## What to do
    Save the tokenizer with its library: `tokenizer.save_pretrained(…)`.

    ## Source
    transformers 5.23.0, tokenization_utils_base.py `from_pretrained`.
    """
    for name in subject.bundle.folders:
        if name in _TOKENIZER_FILES:
            yield Hit(in_file(name), "expected a file, found a folder")
    for name, file in subject.bundle.files.items():
        # tokenizer.json is read by LF505.
        # An empty one is LF030's.
        is_json = isinstance(file, JsonFile) and file.nbytes > 0
        if name in _TOKENIZER_FILES and name != "tokenizer.json" and is_json:
            assert isinstance(file, JsonFile)
            try:
                value = file.load()
            except LoraFormatError as error:
                yield Hit(error.location, error.message)
            else:
                if not isinstance(value, dict):
                    yield Hit(in_file(name), "expected a JSON object")


@rule("LF506", Severity.WARNING, since="0.1.0", needs="base")
def tokens_without_rows(subject: Subject) -> Iterator[Hit]:
    """The adapter's tokenizer has more tokens than the base has embedding rows, but the adapter adds no rows.

    ## Why it matters
    The first text with one of those tokens reads past the end of the table.

    ## Example
    A tokenizer with an added `<pad>` as number 32000, a base with 32000 rows, and no embedding in the adapter.

    ## What to do
    Train and save the embeddings with the adapter (`modules_to_save` or `trainable_token_indices`), or drop the tokens.

    ## Source
    transformers 5.23.0, modeling_utils.py `resize_token_embeddings`.
    """
    assert subject.adapter is not None
    assert subject.base is not None
    tokens = tokens_of(subject.adapter.tokenizer)
    tables = {name: tensor.shape[0] for name, tensor in subject.base.tensors.items() if is_vocabulary_table(name)}
    if tokens is None or any(is_vocabulary_table(name) for name in subject.adapter.updates):
        return
    for name, rows in sorted(tables.items()):
        if tokens > rows:
            yield Hit(name, f"the tokenizer needs {tokens} rows, but the base's table has {rows}")
