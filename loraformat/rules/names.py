"""Family 0: names that are not what they look like."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from loraformat.diagnostics import Severity, show
from loraformat.model.bundle import TensorFile
from loraformat.rules.base import Hit, Subject, rule


@rule("LF038", Severity.WARNING, since="0.1.0")
def deceptive_name(subject: Subject) -> Iterator[Hit]:
    """The name of a weight or a file holds characters that are invisible or look like others.

    ## Why is this bad?
    Such a name reads like another one and is not it: a terminal shows `q_proj`, a loader looks up something else and
    skips the tensor, or control characters change what the terminal shows.

    ## Example
    `q_рroj` with a Cyrillic `р`; a name with a zero-width space or an escape sequence.

    ## Use instead
    Plain ASCII names, as every training library writes them.

    ## Source
    Unicode Technical Report 36, "Visual Security Issues".
    """
    assert subject.adapter is not None
    names = [*subject.adapter.updates, *subject.adapter.unclaimed]
    names += [name for name, file in subject.bundle.files.items() if not isinstance(file, TensorFile)]
    odd = [name for name in names if not name.isascii() or not name.isprintable()]
    for name in odd:
        reason = _reason(name)
        if reason:
            yield Hit(name, reason)
            return


def _reason(name: str) -> str:
    for character in name:
        if show(character) != character:
            return f"an invisible or control character, U+{ord(character):04X}"
    letters = [character for character in name if character.isalpha()]
    strange = [letter for letter in letters if not letter.isascii()]
    if strange and len(strange) < len(letters):
        return f"letters of different alphabets, {unicodedata.name(strange[0], 'unknown')} among Latin ones"
    return ""
