"""The page of `inspect`: a block of facts, then the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import TableRecord
from loraformat.model.summary import Summary
from loraformat.report.base import Report
from loraformat.report.lines import Page, Styled, shorten
from loraformat.report.weights import say_weights
from loraformat.report.words import (
    amount,
    counts,
    cut,
    figure,
    histogram,
    nbytes,
    number,
    parameters,
    percent,
    plural,
    runs,
    updates,
)

_LONGEST_STAMP = 60


def say_inspection(page: Page, report: Report, result: InspectResult) -> None:
    """Everything about one adapter but its findings."""
    summary = report.summary
    if summary is None:
        page.say(Styled(report.subject, "bold"))
        return
    size = f"{plural(summary.tensors, 'tensor')}, {nbytes(summary.nbytes)}, {histogram(summary.dtypes)}"
    page.flow(Styled(report.subject, "bold"), f"  {report.format}  {size}")
    for label, value in _facts(report, summary, result):
        page.fact(label, value)
    say_weights(page, result)
    for skipped in report.skipped:
        page.flow("  ", Styled("not measured against the base: ", "bold"), skipped.reason)


def _shared(summary: Summary) -> str:
    """Why the parameters in the tables add up to more than the number of the adapter's."""
    more = sum(summary.parameters_by_weight.values()) - summary.parameters
    if more <= 0:
        return ""
    return f"; tables add up to {amount(summary.parameters + more)}: they count a factor for each weight that shares it"


def _facts(report: Report, summary: Summary, result: InspectResult) -> list[tuple[str, str]]:
    facts = [("read as", f"{report.format} ({report.reason})")] if report.reason else []
    revision = f", revision {summary.base_revision}" if summary.base_revision else ""
    facts.append(("base", f"{summary.base_model or 'not stated'}{revision}"))
    if summary.base_fingerprint:
        facts.append(("stamp", shorten(summary.base_fingerprint, _LONGEST_STAMP)))
    if summary.family is not None:
        facts.append(("model", summary.family or "unknown names"))
        facts.append(("components", ", ".join(f"{name} {amount(count)}" for name, count in summary.components.items())))
    if summary.task:
        facts.append(("task", summary.task))
    # Only the fused modules of image models are read as several weights with one factor in common.
    is_split = bool(summary.family) and _shared(summary)
    facts.append(("updates", updates(summary) + (", fused modules split into their parts" if is_split else "")))
    if summary.ranks:
        facts.append(("rank", histogram(summary.ranks)))
    if summary.scales:
        facts.append(("scale", histogram(summary.scales)))
    facts.append(("modules", _modules(summary)))
    if summary.targets is not None:
        facts.append(("targets", _targets(summary.targets)))
    share = "" if result.share is None else f" ({result.share:.2%} of base and adapter)"
    total = f" = {amount(summary.parameters)}" if len(summary.parameters_by_kind) > 1 else ""
    facts.append(("parameters", parameters(summary) + total + share + _shared(summary)))
    if result.base_scheme is not None:
        facts.append(
            ("quantized", f"the base, by {result.base_scheme}; shapes and values are those of the dequantized weights")
        )
    facts.extend(_vocabulary(summary))
    facts.extend(result.training.items())
    facts.extend((f"header {name}", value) for name, value in result.metadata.items())
    facts.extend(_figures(result))
    if summary.unclaimed:
        facts.append(("unread", plural(summary.unclaimed, "tensor")))
    return facts


def _listed(counts: Mapping[str, int]) -> str:
    return cut([f"{name} {amount(count)}" for name, count in counts.items()])


def _modules(summary: Summary) -> str:
    kinds = _listed(summary.module_kinds)
    layers = f" in {plural(len(summary.layers), 'layer')} ({runs(summary.layers)})" if summary.layers else ""
    layers = "" if summary.components else layers  # the numbers of several components, or of several stacks of blocks
    return f"{amount(summary.modules)}{layers}{f': {kinds}' if kinds else ''}"


def _targets(targets: tuple[str, ...] | str) -> str:
    return f"pattern {targets}" if isinstance(targets, str) else cut(list(targets)) or "none"


def _vocabulary(summary: Summary) -> list[tuple[str, str]]:
    if summary.vocab_size is None:
        return []
    new = "" if summary.new_rows is None else f", {amount(summary.new_rows)} of them new"
    return [("vocabulary", f"{plural(summary.vocab_size, 'row')}{new}")]


def _figures(result: InspectResult) -> Iterator[tuple[str, str]]:
    if result.total_norm is not None:
        yield "norm", number(result.total_norm)
    if result.total_relative_norm is not None:
        yield "|dW|/|W|", f"{percent(result.total_relative_norm)} of the weights that it changes"
    if result.retained_bf16 is not None:
        kept = f"{percent(result.retained_bf16)} (bfloat16), {percent(result.retained_fp16)} (float16)"
        yield "retained", f"{kept} of the update after rounding"
    for table in result.tables:
        yield "embeddings", f"{table.weight}: {_rows(table)}"


def _rows(table: TableRecord) -> str:
    """New rows against the old ones, by their norms."""
    parts = [f"{plural(table.rows_before, 'existing row')}, median norm {number(table.norm_before)}"]
    if table.changed:
        parts.append(f"{amount(table.changed)} of them changed, now {number(table.norm_changed)}")
    if table.norm_new is not None:
        spread = f"{number(table.norm_new_least)}-{number(table.norm_new_most)}"
        added = plural(table.rows_after - table.rows_before, "row")
        parts.append(f"{added} added, median norm {number(table.norm_new)} ({spread})")
    return "; ".join(parts)


def say_together(page: Page, reports: Sequence[Report]) -> None:
    """Several adapters side by side, a line each."""
    rows = [
        [
            report.subject,
            report.format,
            histogram(summary.ranks),
            histogram(summary.scales),
            amount(summary.weights),
            amount(summary.parameters),
            figure(result.total_norm),
            percent(result.total_relative_norm),
            counts(report.findings) or "-",
        ]
        for report in reports
        if (summary := report.summary) is not None and isinstance(result := report.data, InspectResult)
    ]
    head = ["adapter", "format", "rank", "scale", "weights", "parameters", "norm", "|dW|/|W|", "findings"]
    page.table(head, rows)
