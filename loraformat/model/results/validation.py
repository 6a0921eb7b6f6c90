"""The result of `validate`, separate from the others so that `validate` starts without them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that did not run, and why."""

    code: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class IgnoredFinding:
    """A finding that the project's settings ignore, and why."""

    code: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateResult:
    """What `validate` did besides the findings.

    Attributes:
        checked: codes of the rules that ran, ascending. The report's `skipped` has the others.
        ignored: findings that the settings ignore.
        file: the weight file of findings about tensors; "" if there is none.
        base: URI of the base, with the commit if it is on the Hub; "" if none was given.
    """

    checked: tuple[str, ...]
    ignored: tuple[IgnoredFinding, ...] = ()
    file: str = ""
    base: str = ""
