"""Line numbers of findings: the line of a config key in its file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError
from loraformat.model.bundle import Bundle, TensorFile

_TEXTS = (".json", ".md")
_KEY = re.compile(r'[\s{]*"?([\w]{1,80})"?\s*:')
_LARGEST = 1 << 20


def with_lines(findings: Iterable[Finding], bundle: Bundle) -> tuple[Finding, ...]:
    """The findings, those about a text file of the bundle with a line."""
    lines: dict[str, dict[str, int]] = {}
    return tuple(_with_line(finding, bundle, lines) for finding in findings)


def _with_line(finding: Finding, bundle: Bundle, lines: dict[str, dict[str, int]]) -> Finding:
    found = finding.location
    if found.line or not found.file.endswith(_TEXTS) or found.file not in bundle.files:
        return finding
    if found.file not in lines:
        lines[found.file] = _keys(bundle, found.file)
    line = lines[found.file].get(str(found.path[0]), 1) if found.path else 1
    return replace(finding, location=replace(found, line=line))


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
