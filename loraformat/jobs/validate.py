"""validate: whether an adapter is what it claims to be, and fits its base."""

from __future__ import annotations

from collections.abc import Sequence

from loraformat import rules
from loraformat.containers import open_bundle
from loraformat.errors import ContainerError, FormatError
from loraformat.io import read_bundle
from loraformat.jobs.subject import Assumptions, open_base, with_alpha
from loraformat.model.bundle import Bundle
from loraformat.model.results import Skipped, ValidateResult
from loraformat.model.summary import summarize
from loraformat.report import Report


def validate(
    adapter: str,
    *,
    base: str | None = None,
    deep: bool = False,
    alpha: float | None = None,
    assumptions: Assumptions | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    format: str | None = None,  # noqa: A002
) -> Report:
    """Everything that the rules find about the adapter at a path. What cannot be read is a finding, not an exception.

    Args:
        adapter: folder or file.
        base: folder or file of the base, for the rules about names, shapes and vocabulary.
        deep: also run the rules that load values.
        alpha: for files that do not state it.
        assumptions: what else the files do not say.
        select: codes or prefixes of codes to run; all where empty.
        ignore: codes or prefixes of codes to leave out.
        format: name of a format, to skip detection.

    Raises: StorageError where the path cannot be opened; errors about `base`.
    """
    checkpoint = open_base(base)
    bundle = open_bundle(adapter)
    hints = with_alpha(alpha, assumptions).hints(checkpoint)
    chosen = rules.select(rules.RULES, select, ignore)
    try:
        opened = read_bundle(bundle, format=format, hints=hints)
    except (ContainerError, FormatError) as error:
        return _unreadable(adapter, bundle, error, chosen)
    subject = rules.Subject(bundle=bundle, format=opened.format.NAME, adapter=opened.adapter, base=checkpoint)
    found, skipped = rules.run(subject, chosen, deep=deep)
    notes = [note for note in opened.adapter.notes if rules.is_selected(note.code, select, ignore)]
    findings = sorted((*notes, *found), key=lambda finding: (finding.where, finding.code, finding.message))
    return Report(
        job="validate",
        subject=adapter,
        format=opened.format.NAME,
        because=opened.because,
        summary=summarize(opened.adapter),
        data=ValidateResult(checked=_checked(chosen, skipped)),
        findings=tuple(findings),
        skipped=skipped,
    )


def _unreadable(
    adapter: str, bundle: Bundle, error: ContainerError | FormatError, chosen: Sequence[rules.Rule]
) -> Report:
    """A report on files that no reader could make sense of: the error, and what can be judged without an adapter."""
    found, skipped = rules.run(rules.Subject(bundle=bundle, format=""), chosen)
    return Report(
        job="validate",
        subject=adapter,
        data=ValidateResult(checked=_checked(chosen, skipped)),
        findings=(error.finding(), *found),
        skipped=skipped,
    )


def _checked(chosen: Sequence[rules.Rule], skipped: Sequence[Skipped]) -> tuple[str, ...]:
    left_out = {each.code for each in skipped}
    return tuple(sorted(each.code for each in chosen if each.code not in left_out))
