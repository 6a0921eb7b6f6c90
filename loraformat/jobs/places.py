"""Where in a text file a finding lies: the line of a key of a config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from loraformat.diagnostics import Finding
from loraformat.errors import LoraFormatError
from loraformat.model.bundle import Bundle, TensorFile

_IN_FILE = re.compile(r"([\w.\-() ]+\.(?:json|md))(?:: ([\w_]+))?")
_LARGEST = 1 << 20


def with_lines(findings: Iterable[Finding], bundle: Bundle) -> tuple[Finding, ...]:
    """The findings, those about a text file of the bundle with a line."""
    texts: dict[str, list[str]] = {}
    return tuple(_with_line(finding, bundle, texts) for finding in findings)


def _with_line(finding: Finding, bundle: Bundle, texts: dict[str, list[str]]) -> Finding:
    found = _IN_FILE.match(finding.where)
    if found is None or found[1] not in bundle.files:
        return finding
    lines = texts.setdefault(found[1], _lines(bundle, found[1]))
    stated = re.match(r"line (\d{1,9})\b", finding.message)
    if stated:
        return replace(finding, line=int(stated[1]))
    key = re.compile(rf'\s*"?{re.escape(found[2])}"?\s*:') if found[2] else None
    number = next((number for number, line in enumerate(lines, 1) if key and key.match(line)), 1)
    return replace(finding, line=number)


def _lines(bundle: Bundle, name: str) -> list[str]:
    file = bundle.files[name]
    if isinstance(file, TensorFile) or file.nbytes > _LARGEST:
        return []
    try:
        return file.read().decode("utf-8", "replace").splitlines()
    except LoraFormatError:
        return []
