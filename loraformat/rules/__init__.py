"""The rules, and how they are chosen and run. An adapter goes in, findings come out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from loraformat.diagnostics import Finding, Severity
from loraformat.errors import AdapterRefused
from loraformat.model.results import Skipped
from loraformat.rules.base import Hit, Rule, Subject, rule
from loraformat.rules.base_model import (
    absent_module,
    guessed_orientation,
    renamed_weights,
    shape_mismatch,
    vocabulary_mismatch,
)
from loraformat.rules.config import missing_base_model, schema_violation
from loraformat.rules.consistency import (
    missing_scale,
    pattern_not_evaluated,
    pattern_without_match,
    rank_against_config,
    target_without_tensors,
    tensor_outside_targets,
    unclaimed_tensor,
    unusual_scale,
)
from loraformat.rules.metadata import (
    base_model_disagreement,
    malformed_tokenizer,
    tokens_without_rows,
    tokens_without_tokenizer,
)
from loraformat.rules.shapes import empty_factor, magnitude_shape, no_updates, rank_mismatch, unusual_dtype
from loraformat.rules.values import non_finite_value, zero_update

__all__ = ["RULES", "Hit", "Rule", "Subject", "gate", "is_selected", "refuse", "rule", "run", "select"]

RULES: tuple[Rule, ...] = (
    schema_violation,
    missing_base_model,
    rank_mismatch,
    rank_against_config,
    empty_factor,
    missing_scale,
    target_without_tensors,
    tensor_outside_targets,
    unclaimed_tensor,
    pattern_without_match,
    magnitude_shape,
    no_updates,
    unusual_dtype,
    unusual_scale,
    pattern_not_evaluated,
    absent_module,
    shape_mismatch,
    guessed_orientation,
    renamed_weights,
    vocabulary_mismatch,
    zero_update,
    non_finite_value,
    base_model_disagreement,
    tokens_without_tokenizer,
    malformed_tokenizer,
    tokens_without_rows,
)

_FORCEABLE = ("LF1", "LF2", "LF5", "LF6")
# Without a scale, a partner or fitting shapes there is nothing to compute, whatever the user insists on.
_NEVER_FORCED = frozenset({"LF201", "LF202", "LF205", "LF206", "LF212", "LF213"})


def select(rules: Sequence[Rule], chosen: Collection[str] = (), ignored: Collection[str] = ()) -> tuple[Rule, ...]:
    """The rules whose code starts with one of `chosen` (all where that is empty) and with none of `ignored`."""
    return tuple(each for each in rules if is_selected(each.code, chosen, ignored))


def is_selected(code: str, chosen: Collection[str] = (), ignored: Collection[str] = ()) -> bool:
    """Whether a code starts with one of `chosen` (any, where that is empty) and with none of `ignored`."""
    return (not chosen or code.startswith(tuple(chosen))) and not code.startswith(tuple(ignored))


def run(
    subject: Subject, rules: Sequence[Rule] = RULES, *, deep: bool = False
) -> tuple[tuple[Finding, ...], tuple[Skipped, ...]]:
    """What the rules find, sorted by place and code, and the rules that could not run, with the reason.

    Args:
        deep: whether rules that load values run too.
    """
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for each in rules:
        reason = _why_not(each, subject, deep)
        if reason:
            skipped.append(Skipped(each.code, each.name, reason))
        else:
            findings.extend(_stamped(each, hit) for hit in each.check(subject))
    return tuple(sorted(findings, key=lambda found: (found.where, found.code, found.message))), tuple(skipped)


def gate(subject: Subject) -> tuple[Finding, ...]:
    """What every rule that loads no values finds, and what the reader noted: what a verb must know before it writes."""
    notes = subject.adapter.notes if subject.adapter is not None else ()
    findings, _ = run(subject)
    return tuple(sorted((*notes, *findings), key=lambda found: (found.where, found.code, found.message)))


def refuse(findings: Sequence[Finding], where: str, *, force: bool = False) -> tuple[Finding, ...]:
    """The findings, if the adapter may be used; with `force`, forgivable errors come back as warnings.

    Forgivable are errors about the config, its agreement with the tensors, metadata and runtimes (LF1, LF2, LF5, LF6),
    but never a missing scale, an unpaired factor or a shape.

    Args:
        where: the adapter, for the message.

    Raises: AdapterRefused (LF800) with the errors that remain.
    """
    judged = tuple(_forgiven(finding) if force else finding for finding in findings)
    errors = tuple(finding for finding in judged if finding.severity is Severity.ERROR)
    if errors:
        first = f"{errors[0].where}: {errors[0].message}" if errors[0].where else errors[0].message
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors, first"
        hint = errors[0].hint or f"loraformat explain {errors[0].code}"
        raise AdapterRefused(f"{count} [{errors[0].code}] {first}", where=where, hint=hint, findings=errors)
    return judged


def _forgiven(finding: Finding) -> Finding:
    if finding.code in _NEVER_FORCED or not finding.code.startswith(_FORCEABLE):
        return finding
    return replace(finding, severity=min(finding.severity, Severity.WARNING))


def _why_not(rule: Rule, subject: Subject, deep: bool) -> str:
    if rule.needs in ("adapter", "base") and subject.adapter is None:
        return "the adapter could not be read"
    if rule.needs == "base" and subject.base is None:
        return "no base was given"
    return "loads values: --deep" if rule.slow and not deep else ""


def _stamped(rule: Rule, hit: Hit) -> Finding:
    return Finding(
        code=rule.code, name=rule.name, severity=rule.severity, where=hit.where, message=hit.message, hint=hit.hint
    )
