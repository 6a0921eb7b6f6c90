"""How much of an update survives rounding, as sums over rows."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64
"""Rows that one tally covers, counted from the first row of a weight, so that windows do not show in the sums."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over some rows of a weight; D is the exact update, C what became of it: written value minus base value.

    The counts are exact. The sums may differ in their last digits between the compiled loop and numpy: six digits are
    the same.

    >>> Tally(kept=1.0, whole=2.0, unchanged=3, numel=4, largest=0.5) + Tally(largest=0.25)
    Tally(kept=1.0, whole=2.0, unchanged=3, numel=4, largest=0.5, error=0.0)

    Attributes:
        kept: Σ C·D.
        whole: Σ D·D.
        unchanged: elements where C is zero.
        numel: elements in all.
        largest: max |D|.
        error: Σ (C - D)² where the result was put into codes; else 0.
    """

    kept: float = 0.0
    whole: float = 0.0
    unchanged: int = 0
    numel: int = 0
    largest: float = 0.0
    error: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.kept + other.kept,
            self.whole + other.whole,
            self.unchanged + other.unchanged,
            self.numel + other.numel,
            max(self.largest, other.largest),
            self.error + other.error,
        )
