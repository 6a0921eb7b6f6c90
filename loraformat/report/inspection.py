"""The page of `inspect`: a block of facts, then the weights, then the layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from loraformat.model.results import InspectResult, WeightRecord
from loraformat.model.summary import Summary, layer_of
from loraformat.report.base import Report
from loraformat.report.page import Page, Piece
from loraformat.report.words import amount, histogram, nbytes, number, plural, shape

# More rows than a screen has are grouped; the JSON lists every weight.
_MOST_ROWS = 40
_MOST_NAMES = 12

_WITHOUT_SCALE = ("replace", "rows", "scaled", "rotated", "multiplied")


def say_inspection(page: Page, report: Report, result: InspectResult) -> None:
    """Everything about one adapter but its findings."""
    summary = report.summary
    if summary is None:
        page.say(Piece(report.subject, "bold"))
        return
    size = f"{plural(summary.tensors, 'tensor')}, {nbytes(summary.nbytes)}, {histogram(summary.dtypes)}"
    page.say(Piece(report.subject, "bold"), f"  {report.format}  {size}")
    for label, value in _facts(report, summary, result):
        page.fact(label, value)
    if len(result.weights) <= _MOST_ROWS:
        _say_weights(page, result.weights)
    else:
        _say_groups(page, result.weights)
    _say_layers(page, summary, result)


def _facts(report: Report, summary: Summary, result: InspectResult) -> list[tuple[str, str]]:
    facts = [("read as", f"{report.format} ({report.because})")] if report.because else []
    facts.append(("base", summary.base_model or "not stated"))
    if summary.task:
        facts.append(("task", summary.task))
    facts.append(("updates", _listed(summary.update_kinds) or "none"))
    if summary.ranks:
        facts.append(("rank", histogram(summary.ranks)))
    if summary.scales:
        facts.append(("scale", histogram(summary.scales)))
    facts.append(("modules", _modules(summary)))
    if summary.targets is not None:
        facts.append(("targets", _targets(summary.targets)))
    share = "" if result.share is None else f" ({result.share:.2%} of base and adapter)"
    facts.append(("parameters", amount(summary.parameters) + share))
    facts.extend(_vocabulary(summary))
    if result.total_norm is not None:
        facts.append(("norm", number(result.total_norm)))
    if summary.unclaimed:
        facts.append(("unread", plural(summary.unclaimed, "tensor")))
    return facts


def _listed(counts: Mapping[str, int]) -> str:
    return _cut([f"{name} {amount(count)}" for name, count in counts.items()])


def _modules(summary: Summary) -> str:
    kinds = _listed(summary.module_kinds)
    layers = f" in {plural(len(summary.layers), 'layer')} ({_runs(summary.layers)})" if summary.layers else ""
    return f"{amount(summary.modules)}{layers}{f': {kinds}' if kinds else ''}"


def _targets(targets: tuple[str, ...] | str) -> str:
    return f"pattern {targets}" if isinstance(targets, str) else _cut(list(targets)) or "none"


def _vocabulary(summary: Summary) -> list[tuple[str, str]]:
    if summary.vocab_size is None:
        return []
    new = "" if summary.new_rows is None else f", {amount(summary.new_rows)} of them new"
    return [("vocabulary", f"{plural(summary.vocab_size, 'row')}{new}")]


def _cut(names: list[str]) -> str:
    more = f", and {amount(len(names) - _MOST_NAMES)} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _runs(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) as "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return _cut([str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs])


def _say_weights(page: Page, weights: Sequence[WeightRecord]) -> None:
    has_norms = any(record.norm is not None for record in weights)
    head = ["weight", "update", "shape", "rank", "scale", "parameters", *(["norm"] if has_norms else [])]
    rows = [
        [
            record.weight,
            record.kind,
            shape(record.shape),
            "-" if record.rank is None else str(record.rank),
            "-" if record.kind in _WITHOUT_SCALE else number(record.scale),
            amount(record.parameters),
            *(["-" if record.kind in _WITHOUT_SCALE else number(record.norm)] if has_norms else []),
        ]
        for record in weights
    ]
    page.table(head, rows)


def _say_groups(page: Page, weights: Sequence[WeightRecord]) -> None:
    """Weights that differ in the layer only, on one line."""
    groups: dict[tuple[str, str, str], list[WeightRecord]] = defaultdict(list)
    for record in weights:
        module = record.weight.rpartition(".")[0].rpartition(".")[2]
        groups[module, record.kind, shape(record.shape)].append(record)
    has_norms = any(record.norm is not None for record in weights)
    head = ["module", "update", "shape", "weights", "rank", "parameters", *(["norm", "layer"] if has_norms else [])]
    rows = [
        [
            *key,
            amount(len(group)),
            histogram(_counts([record.rank for record in group if record.rank is not None])),
            amount(sum(record.parameters for record in group)),
            *(_largest(group) if has_norms else []),
        ]
        for key, group in sorted(groups.items())
    ]
    page.table(head, rows)


def _counts(items: Sequence[int]) -> dict[int, int]:
    return dict(sorted(Counter(items).items()))


def _largest(group: Sequence[WeightRecord]) -> list[str]:
    """The largest norm of a group and the layer where it stands."""
    found = max(group, key=lambda record: record.norm or 0.0)
    layer = layer_of(found.weight)
    return [number(found.norm), "-" if layer is None else str(layer)]


def _say_layers(page: Page, summary: Summary, result: InspectResult) -> None:
    if len(result.layer_norms) < 2:
        return
    rows = [
        [str(layer), amount(summary.parameters_by_layer.get(layer, 0)), number(norm)]
        for layer, norm in sorted(result.layer_norms.items())
    ]
    page.table(["layer", "parameters", "norm"], rows)
