"""The vocabulary of a tokenizer.json, read as plain data without building a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraformat.model.bundle import Bundle, RawFile, TensorFile

_LARGEST = 200_000_000
_DEEPEST = 100
_GREATEST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in two facts.

    Attributes:
        rows: embedding rows that its tokens need: the greatest number and one; None where that is unknown.
        faults: what is wrong with it.
    """

    rows: int | None
    faults: tuple[str, ...] = ()


def tokens_of(files: Mapping[str, RawFile]) -> int | None:
    """Embedding rows that the tokenizer of an adapter needs; None where there is none or it cannot be read."""
    return read_vocabulary(files["tokenizer.json"]).rows if "tokenizer.json" in files else None


def faults_of(files: Mapping[str, RawFile]) -> Iterator[tuple[str, str]]:
    """(file, fault) of the tokenizer of an adapter."""
    if "tokenizer.json" in files:
        yield from (("tokenizer.json", fault) for fault in read_vocabulary(files["tokenizer.json"]).faults)


@lru_cache(maxsize=4)
def read_vocabulary(file: RawFile) -> Vocabulary:
    """A tokenizer.json of the tokenizers library, or a plain word list (`word_to_idx`). Raises nothing."""
    if file.nbytes > _LARGEST:
        return Vocabulary(None, (f"expected at most {_LARGEST} bytes, found {file.nbytes}",))
    try:
        content = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Vocabulary(None, (f"not JSON: {error}",))
    if not isinstance(content, dict):
        return Vocabulary(None, ("expected an object",))
    if _depth_exceeds(content):
        return Vocabulary(None, (f"nested more than {_DEEPEST} deep",))
    return _word_list(content) if "word_to_idx" in content else _tokenizers_file(content)


def _word_list(content: Mapping[str, object]) -> Vocabulary:
    words = content["word_to_idx"]
    if not isinstance(words, dict):
        return Vocabulary(None, ("word_to_idx: expected an object",))
    rows, faults = _numbered(words.items(), "word_to_idx")
    size = content.get("vocab_size", len(words))
    if rows is not None and size != len(words):
        faults = (*faults, f"vocab_size: expected {len(words)}, the number of words, found {size!r}")
    return Vocabulary(rows, faults)


def _tokenizers_file(content: Mapping[str, object]) -> Vocabulary:
    model = content.get("model")
    if not isinstance(model, dict):
        return Vocabulary(None, ("model: expected an object with the vocabulary",))
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …], numbered by their place
        rows: int | None = len(vocabulary)
        faults: tuple[str, ...] = ()
    elif isinstance(vocabulary, dict):
        rows, faults = _numbered(vocabulary.items(), "model.vocab")
        faults += _bad_merges(model, vocabulary)
    else:
        return Vocabulary(None, ("model.vocab: expected an object or a list",))
    added, more = _added(content.get("added_tokens"))
    found = [count for count in (rows, added) if count is not None]
    return Vocabulary(max(found, default=None), (*faults, *more, *_bad_charsmaps(content)))


def _added(tokens: object) -> tuple[int | None, tuple[str, ...]]:
    if tokens is None:
        return None, ()
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        return None, ("added_tokens: expected a list of objects",)
    contents = [token.get("content") for token in tokens]
    rows, faults = _numbered(((str(token.get("content")), token.get("id")) for token in tokens), "added_tokens")
    twice = _first_repeated(contents)
    return rows, faults if twice is None else (*faults, f'added_tokens: "{twice}" appears twice')


def _numbered(items: Iterable[tuple[str, object]], where: str) -> tuple[int | None, tuple[str, ...]]:
    """Rows that (token, number) pairs need, and what is wrong with the numbers; nothing is allocated by a number."""
    seen: dict[int, str] = {}
    for token, number in items:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _GREATEST_ID:
            return None, (f'{where}["{token}"]: expected a token number, found {number!r}',)
        if number in seen and seen[number] != token:
            return None, (f'{where}: "{seen[number]}" and "{token}" share the number {number}',)
        seen[number] = token
    return max(seen, default=-1) + 1, ()


def _first_repeated(items: Iterable[object]) -> object | None:
    seen: set[str] = set()
    for item in items:
        if str(item) in seen:
            return item
        seen.add(str(item))
    return None


def _bad_merges(model: Mapping[str, object], vocabulary: Mapping[str, object]) -> tuple[str, ...]:
    """BPE merges whose parts or result are no tokens: the tokenizers library panics on the last kind."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        return ()
    prefix = model.get("continuing_subword_prefix")
    cut = len(prefix) if isinstance(prefix, str) else 0
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            return (f"model.merges: expected two tokens, found {merge!r}",)
        left, right = parts
        missing = [token for token in (left, right, left + right[cut:]) if token not in vocabulary]
        if missing:
            return (f'model.merges: "{left} {right}" needs "{missing[0]}", which is not in the vocabulary',)
    return ()


def _bad_charsmaps(content: Mapping[str, object]) -> tuple[str, ...]:
    """Precompiled normalizers start with the size of their table, which must fit: the library panics otherwise."""
    waiting: list[object] = [content.get("normalizer")]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(value for value in node.values() if isinstance(value, (dict, list)))
            if node.get("type") == "Precompiled" and not _is_charsmap(node.get("precompiled_charsmap")):
                return ("normalizer: precompiled_charsmap is damaged",)
    return ()


def _is_charsmap(text: object) -> bool:
    import base64
    import binascii

    if text is None:
        return True
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return False
    return len(data) >= 4 and int.from_bytes(data[:4], "little") <= len(data) - 4


def _depth_exceeds(content: object) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        inner: list[object] = []
        for node in level:
            children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
            inner.extend(child for child in children if isinstance(child, (dict, list)))
        if not inner:
            return False
        level = inner
    return True


def added_numbers(bundle: Bundle, name: str) -> dict[str, int]:
    """Token → number as added_tokens.json or the `added_tokens` of tokenizer.json have it; {} where that is unclear."""
    file = bundle.files.get(name)
    if file is None or isinstance(file, TensorFile) or file.nbytes > _LARGEST:
        return {}
    try:
        content = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    listed = content.get("added_tokens")
    if isinstance(listed, list):
        content = {token.get("content"): token.get("id") for token in listed if isinstance(token, dict)}
    return {token: number for token, number in content.items() if isinstance(token, str) and type(number) is int}
