"""A bound on the work that untrusted files can cause in a run, counted in steps and not in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraformat.diagnostics import FindingLocation

# A step takes a tenth of a microsecond to half of one.
MOST_STEPS = 20_000_000


@dataclass(slots=True)
class Budget:
    """The steps that are left, and what was left out for the want of them: the same for the same input, everywhere.

    A run makes one and hands it down to everything that compares names with patterns or with one another.

    Attributes:
        left: steps; below zero once something was refused.
        left_out: location → what was not evaluated there.
    """

    left: int = MOST_STEPS
    left_out: dict[FindingLocation, str] = field(default_factory=dict)

    def spend(self, steps: int) -> bool:
        """Take `steps`; False where there were not as many, and the work must not be done."""
        self.left -= steps
        return self.left >= 0

    def leave_out(self, where: FindingLocation, what: str) -> None:
        """Remember what was not evaluated, for the finding that says so (LF216)."""
        self.left_out.setdefault(where, what)
