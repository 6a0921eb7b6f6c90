"""Formatting of amounts: plurals, bytes, shapes, histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from loraformat.diagnostics import Finding, Severity
from loraformat.model.updates import kind_named

if TYPE_CHECKING:
    from loraformat.model.results.factor_changes import FactorChange
    from loraformat.model.summary import Summary

_Key = TypeVar("_Key")

_MOST_NAMES = 12


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


def figure(value: float | None) -> str:
    """A float in four digits; "-" for one that there is not."""
    return "-" if value is None else number(value)


def known(values: Iterable[float | None]) -> list[float]:
    """The values without None."""
    return [value for value in values if value is not None]


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known; None for none."""
    from statistics import median

    found = known(values)
    return median(found) if found else None


def kind_name(kind: str) -> str:
    """What the field calls a kind of update: "LoRA" for "low-rank"."""
    found = kind_named(kind)
    return found.label or kind if found is not None else kind


def updates(summary: Summary) -> str:
    """How many updates are of which kind: "8 LoRA pairs, 1 full weight"; "none" for none."""
    return cut([_counted(kind, count) for kind, count in summary.update_kinds.items()]) or "none"


def _counted(kind: str, count: int) -> str:
    found = kind_named(kind)
    if found is None or not found.unit:
        return f"{amount(count)} {kind_name(kind)}"
    return f"{amount(count)} {found.units}" if found.units and count != 1 else plural(count, found.unit)


def parameters(summary: Summary) -> str:
    """How many parameters are of which kind: "4,096 LoRA + 6,080 full"; "0" for none."""
    kinds = [f"{amount(count)} {kind_name(kind)}" for kind, count in summary.parameters_by_kind.items()]
    return " + ".join(kinds) or "0"


def shape(sizes: Sequence[int]) -> str:
    """(64, 4) as "64 x 4"; 0, which only the base tells, as "?"."""
    return " x ".join(str(size or "?") for size in sizes) or "scalar"


def histogram(counts: Mapping[_Key, int]) -> str:
    """The one value, or "16 (28), 32 (4)": each value with how often it occurs; "-" for none."""
    names = {_value(key): count for key, count in counts.items()}
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} ({amount(count)})" for name, count in names.items()) or "-"


def rank_change(weights: Sequence[FactorChange]) -> str:
    """The ranks before and after: "8 → 3 (17), 4 (39)"."""
    before, after = (
        histogram(dict(sorted(Counter(ranks).items())))
        for ranks in ([each.rank_before for each in weights], [each.rank for each in weights])
    )
    return f"{before} → {after}"


def _value(key: object) -> str:
    if key is None:
        return "unknown"
    return f"{key:.6g}" if isinstance(key, float) else str(key)


def percent(share: float | None) -> str:
    """0.0193 as "1.93%"; "-" for unknown."""
    if share is None:
        return "-"
    digits = 2 if abs(share) >= 1e-4 or share == 0 else 4
    return f"{share:.{digits}%}"


def cut(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f", and {amount(len(names) - _MOST_NAMES)} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def runs(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) as "0-2, 5"."""
    found: list[list[int]] = []
    for each in numbers:
        if found and each == found[-1][-1] + 1:
            found[-1].append(each)
        else:
            found.append([each])
    return cut([str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found])


def counts(findings: Sequence[Finding]) -> str:
    """How many findings of which severity: "2 errors, 1 warning"; "" for none."""
    words = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
    found = {severity: sum(finding.severity is severity for finding in findings) for severity in words}
    return ", ".join(plural(count, words[severity]) for severity, count in found.items() if count)
