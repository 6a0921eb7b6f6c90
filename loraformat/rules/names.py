"""Family 0: deceptive names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from loraformat.diagnostics import Severity, in_file, in_weights, show
from loraformat.model.bundle import TensorFile
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.config import config_at


@rule("LF038", Severity.WARNING, since="0.1.0")
def deceptive_name(subject: Subject) -> Iterator[Hit]:
    """The name of a weight, a file or the base contains characters that are invisible or look like others.

    ## Why it matters
    Such a name looks like another one but differs: a terminal shows `q_proj`, while a loader finds no such module and
    skips the tensor. Control characters can change what the terminal shows.

    ## Example
    `q_рroj` with a Cyrillic `р`; a name with a zero-width space or an escape sequence. In the base's name, which may be
    a path in any alphabet, only invisible characters are reported.

    ## What to do
    Use plain ASCII names, as all training libraries do.

    ## Source
    Unicode Technical Report 36, "Visual Security Issues".
    """
    assert subject.adapter is not None
    names = [(name, in_weights(name)) for name in (*subject.adapter.updates, *subject.adapter.unclaimed)]
    files = (name for name, file in subject.bundle.files.items() if not isinstance(file, TensorFile))
    names += [(name, in_file(name)) for name in files]
    odd = ((name, where) for name, where in names if not name.isascii() or not name.isprintable())
    found = next(((where, reason) for name, where in odd if (reason := _reason(name))), None)
    if found is not None:
        yield Hit(*found)
    unseen = _unseen(subject.adapter.config.base_model or "")
    if unseen:
        field = "base_model_name_or_path" if subject.format == "peft" else "base_model"
        yield Hit(config_at(subject, field), unseen)


def _unseen(name: str) -> str:
    character = next((character for character in name if show(character) != character), None)
    if character is None:
        return ""
    point = ord(character)
    if 0xDC80 <= point <= 0xDCFF:  # as Python decodes a byte of a file name that its encoding does not have
        return f"not UTF-8, the byte 0x{point - 0xDC00:02X}"
    return f"an invisible or control character, U+{point:04X}"


def _reason(name: str) -> str:
    unseen = _unseen(name)
    if unseen:
        return unseen
    letters = [character for character in name if character.isalpha()]
    strange = [letter for letter in letters if not letter.isascii()]
    if strange and len(strange) < len(letters):
        return f"letters of different alphabets, {unicodedata.name(strange[0], 'unknown')} among Latin ones"
    return ""
