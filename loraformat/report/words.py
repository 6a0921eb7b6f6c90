"""Amounts in words that people read: plurals, bytes, shapes, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

_Key = TypeVar("_Key")


def amount(count: int) -> str:
    """41943040 as "41,943,040"."""
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """The count and its noun: "1 weight", "2 weights"."""
    return f"{amount(count)} {noun}{'' if count == 1 else 's'}"


def nbytes(count: int) -> str:
    """Bytes in decimal units, as the Hub shows them: "83.9 MB"."""
    if count < 1000:
        return f"{count} B"
    power = next((power for power in (1, 2, 3) if count < 999.95 * 1000**power), 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def number(value: float | None) -> str:
    """A float in four digits; "?" for unknown."""
    return "?" if value is None else f"{value:.4g}"


def shape(sizes: Sequence[int]) -> str:
    """(64, 4) as "64 x 4"; 0, which only the base tells, as "?"."""
    return " x ".join(str(size or "?") for size in sizes) or "scalar"


def histogram(counts: Mapping[_Key, int]) -> str:
    """The one value, or "16 (28), 32 (4)": each value with how often it occurs; "-" for none."""
    names = {_value(key): count for key, count in counts.items()}
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} ({amount(count)})" for name, count in names.items()) or "-"


def _value(key: object) -> str:
    if key is None:
        return "unknown"
    return f"{key:.6g}" if isinstance(key, float) else str(key)


def at_line_start(text: str) -> str:
    """Text from a file that begins a line: what CI systems would take for a command of theirs is broken up."""
    start = text.lstrip()
    return f"\\{text}" if start.startswith(("::", "##[", "##vso[", "##teamcity[")) else text
