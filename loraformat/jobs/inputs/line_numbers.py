"""Where in a text file a finding lies: the line of a key of a config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError
from loraformat.model.bundle import Bundle, TensorFile

_IN_FILE = re.compile(r"([\w.\-() ]+\.(?:json|md))(?:: ([\w_]+))?")
_KEY = re.compile(r'[\s{]*"?([\w]{1,80})"?\s*:')
_LARGEST = 1 << 20


def with_lines(findings: Iterable[Finding], bundle: Bundle) -> tuple[Finding, ...]:
    """The findings, those about a text file of the bundle with a line."""
    lines: dict[str, dict[str, int]] = {}
    return tuple(_with_line(finding, bundle, lines) for finding in findings)


def _with_line(finding: Finding, bundle: Bundle, lines: dict[str, dict[str, int]]) -> Finding:
    found = _IN_FILE.match(finding.where)
    if found is None or found[1] not in bundle.files:
        return finding
    stated = re.match(r"line (\d{1,9})\b", finding.message)
    if stated:
        return replace(finding, line=int(stated[1]))
    if found[1] not in lines:
        lines[found[1]] = _keys(bundle, found[1])
    return replace(finding, line=lines[found[1]].get(found[2] or "", 1))


def _keys(bundle: Bundle, name: str) -> dict[str, int]:
    """Key → the first line that begins with it, of a JSON text or the front matter of a card."""
    file = bundle.files[name]
    if isinstance(file, TensorFile) or file.nbytes > _LARGEST:
        return {}
    try:
        text = file.read().decode("utf-8", "replace")
    except LoraFormatError:
        return {}
    keys: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        found = _KEY.match(line)
        if found:
            keys.setdefault(found[1], number)
    return keys
