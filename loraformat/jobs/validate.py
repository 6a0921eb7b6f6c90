"""validate: whether an adapter is valid, fits its base, and loads in the target runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraformat import rules
from loraformat.budget import Budget
from loraformat.diagnostics import Finding, in_order
from loraformat.errors import AssumptionContradicted, ContainerError, FormatError, NothingChecked, UsageError
from loraformat.io import hints_of, open_files, read_bundle
from loraformat.jobs.inputs.line_numbers import with_lines
from loraformat.jobs.inputs.subject import open_base
from loraformat.model.assumptions import Assumptions, with_alpha
from loraformat.model.bundle import Bundle
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.validation import IgnoredFinding, Skipped, ValidateResult
from loraformat.model.summary import summarize
from loraformat.report import Report
from loraformat.storage import Location, listed, uri_of, uri_or_none

if TYPE_CHECKING:
    from loraformat.model.tensors import Values
    from loraformat.rules.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Which findings are wanted."""

    select: Sequence[str] = ()
    ignore: Sequence[str] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def sift(self, findings: Sequence[Finding]) -> tuple[tuple[Finding, ...], tuple[IgnoredFinding, ...]]:
        """The findings that are reported, sorted, and those that are ignored for a reason."""
        told: list[Finding] = []
        ignored: list[IgnoredFinding] = []
        for finding in in_order(findings):
            prefix = next((code for code in self.reasons if finding.code.startswith(code)), None)
            if prefix is not None:
                ignored.append(IgnoredFinding(finding.code, finding.where, self.reasons[prefix]))
            elif rules.is_selected(finding.code, self.select, self.ignore):
                told.append(finding)
        return tuple(told), tuple(ignored)


def validate(
    adapter: Location,
    *,
    base: Location | None = None,
    deep: bool = False,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    reasons: Mapping[str, str] | None = None,
    target: Sequence[str] = (),
    max_lora_rank: int | None = None,
    format: str | None = None,  # noqa: A002
) -> Report:
    """Check an adapter with all rules. If something cannot be read, that is a finding, not an exception.

    >>> import loraformat
    >>> report = loraformat.validate("fixtures/minigpt/lora_adapter", base="fixtures/minigpt/base")
    >>> report.ok, [finding.code for finding in report.findings]
    (False, ['LF206', 'LF031'])

    Args:
        adapter: folder or file.
        base: folder or file of the base, for the rules about names, shapes and vocabulary.
        deep: also run the rules that load values.
        alpha: for files that do not state it.
        assumptions: what else the files do not state.
        select: codes or prefixes of codes to run, in upper or lower case; all if empty.
        ignore: codes or prefixes of codes to leave out, in upper or lower case.
        reasons: code or prefix → reason to ignore its findings; they are counted and listed with that reason.
        target: runtimes that the adapter is for: "vllm", "peft==0.10".
        max_lora_rank: the highest rank that the runtime is configured to allow.
        format: name of a format, to skip detection.

    If no rule ran, the report has the error LF022, because nothing is known about the adapter.

    Raises: StorageError: the path cannot be opened; UsageError: no such target or code; errors about `base`.
    """
    adapter, base = uri_of(adapter), uri_or_none(base)
    select, ignore = _codes(listed(select, "codes"), "select"), _codes(listed(ignore, "codes"), "ignore")
    reasons = dict(zip(_codes(tuple(reasons or {}), "reasons"), (reasons or {}).values(), strict=True))
    checkpoint = open_base(base)
    bundle = open_files(adapter, format=format)
    budget = Budget()
    hints = hints_of(with_alpha(alpha, assumptions), checkpoint, budget)
    chosen = rules.select(rules.RULES, select, ignore)
    choice = _Choice(select=select, ignore=ignore, reasons=reasons)
    wanted = tuple(_target(text) for text in listed(target, "runtimes"))
    try:
        opened = read_bundle(bundle, format=format, hints=hints)
    except (ContainerError, FormatError, AssumptionContradicted) as error:
        return _unreadable(adapter, bundle, error, chosen, choice)
    subject = rules.Subject(
        bundle=bundle,
        format=opened.format.NAME,
        adapter=opened.adapter,
        base=checkpoint,
        read_base=_reader(checkpoint) if deep else None,
        targets=wanted,
        max_rank=max_lora_rank,
        budget=budget,
    )
    found, skipped = rules.run(subject, chosen, deep=deep)
    told, ignored = choice.sift((*opened.adapter.notes, *found))
    checked = _checked(chosen, skipped)
    if not checked:
        told = in_order((*told, _nothing_checked(skipped)))
    return Report(
        job="validate",
        subject=adapter,
        format=opened.format.NAME,
        reason=opened.reason,
        summary=summarize(opened.adapter),
        data=ValidateResult(
            checked=checked,
            ignored=ignored,
            file=_weights(bundle),
            base=checkpoint.uri if checkpoint is not None else "",
        ),
        findings=with_lines(told, bundle),
        skipped=skipped,
    )


def _unreadable(
    adapter: str,
    bundle: Bundle,
    error: ContainerError | FormatError | AssumptionContradicted,
    chosen: Sequence[rules.Rule],
    choice: _Choice,
) -> Report:
    """A report on files that no reader could make sense of: the error, and what can be judged without an adapter.

    The error cannot be deselected: there would be nothing to say, and nothing was checked.
    """
    found, skipped = rules.run(rules.Subject(bundle=bundle, format=""), chosen)
    told, ignored = choice.sift(found)
    return Report(
        job="validate",
        subject=adapter,
        data=ValidateResult(checked=_checked(chosen, skipped), ignored=ignored, file=_weights(bundle)),
        findings=with_lines((error.finding(), *told), bundle),
        skipped=skipped,
    )


def _codes(texts: Sequence[str], option: str) -> tuple[str, ...]:
    if not texts:  # which codes there are is looked up only where it matters: validate starts without the merger
        return ()
    from loraformat.jobs.explain import checked_codes

    return checked_codes(texts, f"--{option}")


def _nothing_checked(skipped: Sequence[Skipped]) -> Finding:
    reasons = ", ".join(dict.fromkeys(each.reason for each in skipped))
    why = f"the selected rules could not ({reasons})" if reasons else "none are selected"
    return NothingChecked(f"no rule ran: {why}", hint="select other rules, or provide what these need").finding()


def _target(text: str) -> Target:
    from loraformat.rules import targets

    try:
        return targets.parse(text)
    except ValueError as error:
        raise UsageError(f'"{text}": {error}', where="--target") from error


def _reader(base: Checkpoint | None) -> Callable[[str, int, int], Values] | None:
    """Rows of a tensor of the base, by name."""
    if base is None:
        return None
    return lambda name, start, stop: base.weights[name].read(start, stop)


def _weights(bundle: Bundle) -> str:
    """The name of the weight file that a reader takes first."""
    names = [file.name for file in bundle.tensor_files() if not file.name.startswith(("optimizer", "training_args"))]
    return next((name for name in names if name.startswith(("adapter", "lora"))), names[0] if names else "")


def _checked(chosen: Sequence[rules.Rule], skipped: Sequence[Skipped]) -> tuple[str, ...]:
    left_out = {each.code for each in skipped}
    return tuple(sorted(each.code for each in chosen if each.code not in left_out))
