"""Names from files in YAML and Markdown: whatever is in them, they stay where they are put."""

from __future__ import annotations

import re

from loraformat.diagnostics import show

_LONGEST = 300
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./\-]*")
# Words that YAML 1.1 reads as something else than text.
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def yaml_text(text: str) -> str:
    """A scalar: as it is where it can be taken for nothing else, else in double quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return f'"{"".join(map(_yaml_character, text))}"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    number = ord(character)
    if 0xD800 <= number <= 0xDFFF:
        return "?"
    return f"\\u{number:04X}" if number < 0x10000 else f"\\U{number:08X}"


def code(text: str) -> str:
    """A span of code, whose fence is longer than any row of backticks in the text.

    >>> code("a`b")
    '`` a`b ``'
    """
    safe = show(text, _LONGEST)
    fence = "`" * (1 + max((len(each) for each in re.findall("`+", safe)), default=0))
    pad = " " if "`" in safe or not safe.strip() else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def heading(text: str) -> str:
    """A heading in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", show(text, _LONGEST))


def python_text(text: str) -> str:
    """A string of Python, in one line of printing characters."""
    return '"' + "".join(_python_character(each) for each in text[:_LONGEST]) + '"'


def _python_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    number = ord(character)
    if character.isprintable():
        return character
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def shell_text(text: str) -> str:
    """A word of a command line."""
    import shlex

    return shlex.quote(show(text, _LONGEST))
