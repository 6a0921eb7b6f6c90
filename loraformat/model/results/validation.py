"""What the rules find out, as data: apart from the other results, so that `validate` starts without them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that was not made, and why."""

    code: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class IgnoredFinding:
    """A finding that the project's settings leave out, and why."""

    code: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateResult:
    """What `validate` did beside the findings.

    Attributes:
        checked: codes of the rules that ran, ascending. Those that did not stand in the report's `skipped`.
        ignored: what the rules found and the settings leave out.
        file: the weight file that findings about tensors are about; "" where there is none.
        base: URI of the base, with the commit where it is on the Hub; "" where none was given.
    """

    checked: tuple[str, ...]
    ignored: tuple[IgnoredFinding, ...] = ()
    file: str = ""
    base: str = ""
