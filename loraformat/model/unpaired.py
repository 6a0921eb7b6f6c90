"""Which tensors a finding LF201 explains, so that LF210 does not report the same ones in other words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loraformat.diagnostics import Finding

# In the message of an LF201, after the factor that is there.
PRESENT = " is present, but "

# Parts of a tensor's name: wrappers before the module, and the factor with what may follow it ("default", "weight").
_MOST_BEFORE, _MOST_AFTER = 4, 3


def without_unpaired(names: Iterable[str], notes: Iterable[Finding]) -> list[str]:
    """The names of tensors that no LF201 among the notes is about; each names a module and how its factor is called."""
    factors: dict[str, set[str]] = {}
    for note in notes:
        if note.code == "LF201":
            factors.setdefault(note.location.tensor, set()).add(note.message.partition(PRESENT)[0].lower())
    return [name for name in names if not (factors and _is_unpaired(name, factors))]


def _is_unpaired(name: str, factors: Mapping[str, Collection[str]]) -> bool:
    parts = name.split(".")
    return any(
        parts[end].lower().endswith(factor)
        for end in range(max(1, len(parts) - _MOST_AFTER), len(parts))
        for start in range(min(end, _MOST_BEFORE))
        for factor in factors.get(".".join(parts[start:end]), ())
    )
