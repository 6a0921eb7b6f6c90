"""The rules, and how they are chosen and run. An adapter goes in, findings come out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from loraformat.diagnostics import Finding, Severity, in_order
from loraformat.errors import AdapterRefused
from loraformat.model.floats import quietly
from loraformat.model.results.validation import Skipped
from loraformat.rules import (
    base_model,
    config,
    consistency,
    coverage,
    files,
    layers,
    names,
    quantization,
    settings,
    shapes,
)
from loraformat.rules.base import Hit, Rule, Subject, rule
from loraformat.rules.metadata import card, statements
from loraformat.rules.quantization import doubts
from loraformat.rules.runtimes import exports, images, loading, serving
from loraformat.rules.values import oddities, spectra, stored

__all__ = [
    "MOST_HITS",
    "RULES",
    "Hit",
    "Rule",
    "Subject",
    "doubts",
    "gate",
    "is_selected",
    "metadata",
    "refuse",
    "rule",
    "run",
    "select",
    "targets",
]

RULES: tuple[Rule, ...] = (
    files.empty_file,
    files.pickled_weights,
    files.second_weight_file,
    files.confusable_file_name,
    files.python_files,
    files.unfinished_download,
    files.pointer_file,
    names.deceptive_name,
    config.schema_violation,
    config.missing_base_model,
    settings.base_is_a_path,
    settings.unknown_task,
    settings.conflicting_settings,
    settings.broken_pattern,
    settings.repeated_target,
    settings.excluded_target,
    settings.ambiguous_pattern,
    settings.imports_library,
    settings.training_mode,
    settings.newer_writer,
    settings.quantized_base_name,
    settings.saved_and_targeted,
    shapes.rank_mismatch,
    consistency.rank_against_config,
    shapes.empty_factor,
    consistency.missing_scale,
    consistency.target_without_tensors,
    consistency.tensor_outside_targets,
    consistency.unclaimed_tensor,
    consistency.pattern_without_match,
    shapes.magnitude_shape,
    shapes.no_updates,
    shapes.no_factors,
    shapes.unusual_dtype,
    consistency.unusual_scale,
    consistency.pattern_not_evaluated,
    layers.mixed_dtypes,
    layers.missing_layer,
    layers.odd_shape,
    layers.exchanged_factors,
    layers.rank_above_dimensions,
    layers.implausible_layer,
    layers.undeclared_magnitude,
    layers.vanishing_scale,
    layers.half_fused_group,
    exports.torchtune_export,
    base_model.absent_module,
    base_model.shape_mismatch,
    base_model.guessed_orientation,
    base_model.renamed_weights,
    base_model.vocabulary_mismatch,
    coverage.lands_in_part,
    coverage.uncovered_module,
    coverage.tied_table,
    quantization.quantized_base,
    coverage.base_without_config,
    quantization.dequantized_base,
    quantization.leftover_quantization,
    quantization.codes_without_settings,
    quantization.doubtful_settings,
    quantization.mixed_precision_group,
    quantization.trained_on_codes,
    base_model.other_base,
    base_model.base_in_another_form,
    stored.zero_update,
    stored.non_finite_value,
    spectra.collapsed_rank,
    spectra.norm_outlier,
    spectra.float16_overflow,
    spectra.lost_to_rounding,
    oddities.repeated_update,
    oddities.unused_component,
    oddities.odd_magnitude,
    oddities.empty_row,
    statements.base_model_disagreement,
    card.card_without_base,
    card.card_without_license,
    statements.tokens_without_tokenizer,
    statements.malformed_tokenizer,
    statements.unreadable_tokenizer_file,
    statements.tokens_without_rows,
    card.card_disagreement,
    card.card_metadata,
    card.personal_path,
    card.leaked_credential,
    card.added_tokens_disagreement,
    loading.rank_above_default,
    loading.unsupported_replacement,
    loading.unsupported_dora,
    loading.unsupported_bias,
    loading.unsupported_module,
    loading.ignored_rslora,
    loading.ignored_alpha_pattern,
    loading.ignored_rank_pattern,
    loading.unconverted_initialization,
    loading.unsupported_container,
    loading.unsupported_key,
    serving.unsupported_target_expression,
    serving.unsupported_kind,
    serving.fractional_setting,
    serving.unknown_to_version,
    serving.unsupported_embedding,
    serving.unsupported_experts,
    serving.unpaired_projection,
    serving.foreign_format,
    serving.rank_above_limit,
    serving.uneven_layers,
    images.unread_spelling,
    images.left_out_module,
    images.misread_module,
    images.untried_spelling,
    images.ignored_header,
)

MOST_HITS = 200


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
    trained = _as_trained(subject)
    for each in rules:
        reason = _why_not(each, subject, deep)
        if reason:
            skipped.append(Skipped(each.code, each.name, reason))
        else:
            own = subject if each.needs == "base" else trained
            hits = _limited_quietly(each.check(own)) if each.slow else _limited(each.check(own))
            findings.extend(map(each.finding, hits))
    reporter = consistency.pattern_not_evaluated
    for where, what in subject.budget.left_out.items():
        if reporter in rules:
            findings.append(reporter.finding(Hit(where, what)))
        else:  # nobody asked for that rule, and still a rule that was asked for did not look at everything
            skipped.append(Skipped(reporter.code, reporter.name, f"{where}: {what}"))
    return in_order(findings), tuple(skipped)


def _as_trained(subject: Subject) -> Subject:
    """The subject for rules that compare the adapter with its own config: in the names that it was trained with."""
    origin = None if subject.adapter is None else subject.adapter.origin
    return subject if origin is None else replace(subject, adapter=origin, base=None)


def _limited(hits: Iterator[Hit]) -> list[Hit]:
    """The first hits of a rule, and how many more there are: nobody reads a hundred thousand of one kind."""
    first = list(islice(hits, MOST_HITS))
    more = sum(1 for _ in hits)
    return [*first, Hit(first[-1].where, f"and {more} more like this")] if more else first


_limited_quietly = quietly(_limited)  # for rules that look at values, of which some are not finite


def gate(subject: Subject) -> tuple[Finding, ...]:
    """What a verb must know before it writes: what the reader noted, and what every rule finds that loads no values.

    Rules of the level of a note, and those about publishing the adapter, are left to `validate`.
    """
    notes = subject.adapter.notes if subject.adapter is not None else ()
    quick = (each for each in RULES if each.severity is not Severity.INFO and not each.publishing)
    findings, _ = run(subject, tuple(quick))
    return in_order((*notes, *findings))


def refuse(findings: Sequence[Finding], where: str, *, force: bool = False) -> tuple[Finding, ...]:
    """The findings, if the adapter may be used; with `force`, forgivable errors come back as warnings.

    Args:
        where: the adapter, for the message.

    Raises: AdapterRefused (LF800) with the errors that remain.
    """
    judged = tuple(_forgiven(finding) if force and finding.forgivable else finding for finding in findings)
    errors = tuple(finding for finding in judged if finding.severity is Severity.ERROR)
    if errors:
        shown = min(errors, key=_family)  # what the adapter lacks itself comes before what it is to a base
        first = f"{shown.where}: {shown.message}" if shown.where else shown.message
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors, first"
        hint = shown.hint or f"loraformat explain {shown.code}"
        raise AdapterRefused(f"{count} [{shown.code}] {first}", where=where, hint=hint, findings=errors)
    return judged


def _family(finding: Finding) -> str:
    return finding.code[:3]


def _forgiven(finding: Finding) -> Finding:
    return replace(finding, severity=min(finding.severity, Severity.WARNING))


def _why_not(rule: Rule, subject: Subject, deep: bool) -> str:
    if rule.needs != "bundle" and subject.adapter is None:
        return "the adapter could not be read"
    if rule.needs == "base" and subject.base is None:
        return "no base was given"
    if rule.needs == "target" and not subject.targets:
        return "no target was given"
    return "values are read only with --deep" if rule.slow and not deep else ""
