"""What a rule is: a generator of hits, with a code, a severity and a docstring that is its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from loraformat.budget import Budget
from loraformat.diagnostics import Finding, FindingLocation, Severity, in_weights

if TYPE_CHECKING:
    from loraformat.matching import Matching
    from loraformat.matching.base_fingerprint import Verdict
    from loraformat.model.adapter import Adapter
    from loraformat.model.bundle import Bundle
    from loraformat.model.checkpoint import Checkpoint
    from loraformat.model.tensors import Values
    from loraformat.rules.targets import Target


@dataclass(frozen=True, slots=True)
class Hit:
    """One occurrence of a fault: where, what is expected against what is found, what to do.

    Attributes:
        where: a location, or the name of a tensor, a weight of the base or a module; "" for the adapter as a whole.
    """

    where: str | FindingLocation
    message: str
    hint: str = ""

    @property
    def location(self) -> FindingLocation:
        """What it is about."""
        return in_weights(self.where) if isinstance(self.where, str) else self.where


def first_of(names: Sequence[str]) -> FindingLocation:
    """The first tensor or module, and how many more there are."""
    return in_weights(names[0], more=len(names) - 1)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What rules look at.

    Attributes:
        format: name of the detected format; "" where detection failed.
        adapter: None where reading failed.
        base: the checkpoint given with `--base`, or None.
        read_base: (tensor, start, stop) → those rows of a tensor of the base; None where values may not be read.
        targets: the runtimes given with `--target`.
        max_rank: the greatest rank that the server was told to allow, where the caller says so.
        budget: the steps of the run; what rules do not evaluate for the want of them becomes LF216.
    """

    bundle: Bundle
    format: str
    adapter: Adapter | None = None
    base: Checkpoint | None = None
    read_base: Callable[[str, int, int], Values] | None = None
    targets: tuple[Target, ...] = ()
    max_rank: int | None = None
    budget: Budget = field(default_factory=Budget)

    @cached_property
    def matching(self) -> Matching:
        """Which update lands on which weight of the base, found once for all rules; the matcher is imported here."""
        from loraformat.matching import match

        assert self.adapter is not None
        assert self.base is not None
        return match(self.adapter, self.base)

    @cached_property
    def binding(self) -> Verdict | None:
        """How the base compares with the one that the adapter was stamped with, found once for all rules."""
        from loraformat.matching.base_fingerprint import compare, parse

        assert self.adapter is not None
        assert self.base is not None
        stamped = parse(self.adapter.config.base_fingerprint or "")
        return None if stamped is None else compare(stamped, self.base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A check.

    Attributes:
        needs: "bundle", "adapter", "base" or "target".
        slow: it loads values.
        forgivable: `--force` turns its errors into warnings. Without a scale, a partner or fitting shapes there is
            nothing to compute, so the rules about those never have it.
        publishing: it is about publishing the adapter; only `validate` runs it.
    """

    code: str
    name: str
    severity: Severity
    since: str
    needs: str
    slow: bool
    forgivable: bool
    publishing: bool
    check: Callable[[Subject], Iterator[Hit]]

    def finding(self, hit: Hit) -> Finding:
        """The finding of one occurrence."""
        return Finding(
            code=self.code,
            name=self.name,
            severity=self.severity,
            location=hit.location,
            message=hit.message,
            hint=hit.hint,
            forgivable=self.forgivable,
        )


def rule(
    code: str,
    severity: Severity,
    *,
    since: str,
    needs: str = "adapter",
    slow: bool = False,
    forgivable: bool = False,
    publishing: bool = False,
) -> Callable[[Callable[[Subject], Iterator[Hit]]], Rule]:
    """Make a Rule of a generator; its name is the function's, with hyphens. Registers nothing."""

    def decorate(check: Callable[[Subject], Iterator[Hit]]) -> Rule:
        return Rule(
            code=code,
            name=check.__name__.replace("_", "-"),
            severity=severity,
            since=since,
            needs=needs,
            slow=slow,
            forgivable=forgivable,
            publishing=publishing,
            check=check,
        )

    return decorate
