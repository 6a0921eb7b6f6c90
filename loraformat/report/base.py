"""Report: the result of a verb, independent of how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from loraformat.diagnostics import Finding, Severity, show

if TYPE_CHECKING:
    from loraformat.model.results.validation import Skipped
    from loraformat.model.results.verbs import Result
    from loraformat.model.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a verb.

    >>> import loraformat
    >>> report = loraformat.validate("fixtures/minigpt/lora_adapter", select=["LF2"])
    >>> report.ok, report.worst.value, report.findings[0].hint
    (False, 'error', 'pass it with --alpha A')

    Attributes:
        job: name of the verb: "inspect", "validate", "convert", "merge", "stamp", "verify", "plot", "diff", "estimate",
            "resize", "combine", "scale", "pick", "extract", "unmerge", "ablate", "init", "card".
        subject: URI of the adapter; for merge and estimate that of the base, for diff that of the first.
        format: name of the detected format; "" if detection failed.
        reason: why it was detected.
        summary: statistics of the adapter; None if it could not be read, or if there are several.
        data: the verb's own result; None if the verb failed.
        findings: sorted by location and code.
        skipped: checks that did not run.
        written: paths of the written files or folders.
    """

    job: str
    subject: str
    format: str = ""
    reason: str = ""
    summary: Summary | None = None
    data: Result | None = None
    findings: tuple[Finding, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error-level finding."""
        return not self.reaches(Severity.ERROR)

    @property
    def worst(self) -> Severity | None:
        """The highest severity of all findings; None without findings."""
        return max((finding.severity for finding in self.findings), default=None)

    def reaches(self, severity: Severity) -> bool:
        """Whether any finding is at least as severe."""
        return self.worst is not None and self.worst >= severity

    def records(self) -> list[dict[str, object]]:
        """One dict for each record of `inspect`, `diff`, `unmerge`, `estimate` or a verb that writes factors.

        [] for other jobs.
        """
        from loraformat.model.results.differences import DiffResult
        from loraformat.model.results.estimates import EstimateResult
        from loraformat.model.results.factor_changes import FactorResult
        from loraformat.model.results.verbs import InspectResult, UnmergeResult

        match self.data:
            case InspectResult() | DiffResult() | FactorResult() | UnmergeResult():
                return [asdict(record) for record in self.data.weights]
            case EstimateResult():
                return [asdict(module) for module in self.data.modules]
            case _:
                return []

    def __str__(self) -> str:
        """What the command line prints of it."""
        from loraformat.report import render

        return render(self).rstrip("\n")

    def _repr_html_(self) -> str:
        """What a notebook shows: a caption, the heat map where there are norms, findings and records, all escaped."""
        from loraformat.model.results.verbs import InspectResult
        from loraformat.report.notebook import drawing_of, table_of

        state = "ok" if self.ok else "not ok"
        caption = _text(f"{self.job} {self.subject} ({self.format or 'unknown format'}): {state}")
        drawing = drawing_of(self.data.weights) if isinstance(self.data, InspectResult) else ""
        records = [{name: value for name, value in row.items() if name not in _LONG} for row in self.records()]
        tables = table_of([_finding_row(finding) for finding in self.findings]) + table_of(records)
        return f'<div class="loraformat"><p>{caption}</p>{drawing}{tables}</div>'


_LONG = ("singular_values",)


def _finding_row(finding: Finding) -> dict[str, object]:
    return dict(finding.record())


def _text(value: object) -> str:
    import html

    return html.escape(show(value))
