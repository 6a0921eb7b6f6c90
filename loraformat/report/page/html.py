"""One page with everything in it: no network, no other files. jinja2 is imported here and nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain

from loraformat.algebra.retention import is_lost
from loraformat.diagnostics import Finding, FindingLocation, Severity, json_text, show
from loraformat.model.results.plot_data import Picture, Subject
from loraformat.report.cells import Grid, Row, bands_of, grid_of, rows_of
from loraformat.report.page.data import page_data
from loraformat.report.page.heatmap import heat, matrix
from loraformat.report.page.made import Made, component_rows, made_of
from loraformat.report.page.svg import curve, histogram, spectra
from loraformat.report.weights import by_module
from loraformat.report.words import amount, nbytes, number, parameters, percent, plural
from loraformat.report.words import histogram as listed

_MOST_FINDINGS = 100  # that are seen at once; the others are folded
_LEAST_FINDINGS = 10  # of each adapter, however many there are
_MOST_SPECTRA = 24
_MOST_CONFIG = 100_000
_COLUMNS_OF_STEPS = 160


def render_page(picture: Picture) -> str:
    """The page as HTML text.

    Its content security policy lets nothing load, and runs its own style and script alone, by their hashes. All text
    from files is escaped.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(_part("page.html"))
    style, script = _part("page.css"), _part("page.js")
    views = [_view(subject, number) for number, subject in enumerate(reversed(picture.shown))][::-1]
    return template.render(
        picture=picture,
        base=None if picture.base is None else show(picture.base),
        main=views[-1],
        views=views,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        findings=_findings(picture),
        steps=_steps(picture),
        curves=_curves(picture.subjects) if picture.is_run else [],
        data=_embedded(picture, views),
    )


@dataclass(frozen=True, slots=True)
class _View:
    """One adapter weight by weight.

    Attributes:
        suffix: of the names of its elements; "" for the last adapter.
        name: for the title: the label, or of a step the last part of its path.
    """

    suffix: str
    uri: str
    label: str
    name: str
    format: str
    cards: Sequence[_Card]
    subject: Subject
    rows: Sequence[Row]
    grid: Grid
    legend: str
    heat: str
    spectra: Sequence[str]
    more_spectra: int
    histogram: str
    kept: str
    tables: Sequence[Sequence[str]]
    components: Sequence[Sequence[str]]
    made: Made | None
    modules: _Table
    config: str


def _view(subject: Subject, number: int) -> _View:
    weights = subject.result.weights
    rows = rows_of(weights)
    records = [row.record for row in rows]
    grid, bands = grid_of(records, weights), bands_of(weights)
    return _View(
        suffix=f"-{number}" if number else "",
        uri=show(subject.uri),
        label=show(subject.label),
        name=show(subject.label if subject.step is None else os.path.basename(os.path.normpath(subject.uri))),
        format=subject.format,
        cards=_cards(subject),
        subject=subject,
        rows=rows,
        grid=grid,
        legend=_legend(grid),
        heat=heat(grid, grid.metrics[0], records) if grid.metrics else "",
        spectra=spectra(bands[:_MOST_SPECTRA]),
        more_spectra=max(0, len(bands) - _MOST_SPECTRA),
        histogram=histogram(subject.base_bins, subject.update_bins),
        kept=_kept(subject),
        tables=_tables(subject),
        components=component_rows(subject.components),
        made=made_of(subject.made_by, subject.made),
        modules=_modules(subject),
        config=_config(subject),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Findings of one subject: the first of them, and the others."""

    label: str
    findings: Sequence[Finding]
    others: Sequence[Finding]


def _findings(picture: Picture) -> list[_Found]:
    """What was found about each subject that has findings; none crowds out those of another."""
    most = max(_LEAST_FINDINGS, _MOST_FINDINGS // len(picture.subjects))
    return [
        _Found(
            show(each.label), *([_shown(one) for one in some] for some in (each.findings[:most], each.findings[most:]))
        )
        for each in picture.subjects
        if each.findings
    ]


@dataclass(frozen=True, slots=True)
class _Card:
    figure: str
    what: str
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def _part(name: str) -> str:
    return (resources.files("loraformat.report.page") / "parts" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(picture: Picture, views: Sequence[_View]) -> str:
    """JSON that cannot end its script element."""
    text = json_text(page_data(picture, [(view.subject, view.rows, view.grid) for view in views]), is_compact=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(finding: Finding) -> Finding:
    return Finding(
        code=finding.code,
        name=finding.name,
        severity=finding.severity,
        location=FindingLocation(subject=show(finding.where)),
        message=show(finding.message, 2000),
        hint=show(finding.hint),
    )


def _cards(main: Subject) -> list[_Card]:
    summary, result = main.summary, main.result
    share = "" if result.share is None else f", {result.share:.2%} of base and adapter"
    cards = [
        _Card(amount(summary.parameters), f"parameters ({parameters(summary)}){share}"),
        _Card(nbytes(summary.nbytes), f"in {plural(summary.tensors, 'tensor')}, {listed(summary.dtypes)}"),
        _Card(amount(summary.weights), f"weights in {plural(len(summary.layers), 'layer')}"),
        _Card(listed(summary.ranks), "rank"),
        _Card(listed(summary.scales), "scale"),
    ]
    if result.total_norm is not None:
        cards.append(_Card(number(result.total_norm), "‖ΔW‖ of all weights"))
    if result.total_relative_norm is not None:
        cards.append(_Card(percent(result.total_relative_norm), "‖ΔW‖ / ‖W‖"))
    if result.retained_bf16 is not None:
        cards.append(_Card(percent(result.retained_bf16), "kept if merged in bfloat16", is_lost(result.retained_bf16)))
    if main.made is not None and math.isfinite(main.made.error):
        cards.append(
            _Card(percent(main.made.error), f"of ‖ΔW‖ lost by {show(main.made_by)} ({show(main.made.method)})")
        )
    errors = sum(finding.severity is Severity.ERROR for finding in main.findings)
    outliers = sum(record.is_outlier for record in result.weights)
    cards.append(_Card(amount(outliers), "outlier" if outliers == 1 else "outliers"))
    cards.append(_Card(amount(len(main.findings)), "finding" if len(main.findings) == 1 else "findings", errors > 0))
    return cards


def _legend(grid: Grid) -> str:
    if not grid.metrics:
        return ""
    metric = grid.metrics[0]
    scale = grid.scale_of(metric)
    below = "" if scale.least == scale.low else f" and less, down to {number(scale.least)}"
    above = "" if scale.largest == scale.high else f" and more, up to {number(scale.largest)}"
    ends = f"0 is {number(scale.low)}{below}, 9 is {number(scale.high)}{above}, {metric.scale} scale"
    ends = ends if scale.high > 0 else ""
    untrained = "∅ untrained: the update is zero" if grid.has_untrained(metric) else ""
    return "; ".join(part for part in (ends, untrained) if part)


def _steps(picture: Picture) -> str:
    """Several subjects by layers."""
    if len(picture.subjects) < 2:
        return ""
    layers = sorted(set(chain.from_iterable(subject.result.layer_norms for subject in picture.subjects)))
    if not layers:
        return ""
    size = -(-len(layers) // _COLUMNS_OF_STEPS)
    bins = [layers[at : at + size] for at in range(0, len(layers), size)]
    labels = [str(bin_[0]) if len(bin_) == 1 else f"{bin_[0]}-{bin_[-1]}" for bin_ in bins]
    values = [
        {
            label: max(found)
            for label, bin_ in zip(labels, bins, strict=True)
            if (found := [norm for layer in bin_ if (norm := subject.result.layer_norms.get(layer)) is not None])
        }
        for subject in picture.subjects
    ]
    title = "‖ΔW‖ of each layer at each step" if picture.is_run else "‖ΔW‖ of each layer of each adapter"
    return matrix([show(subject.label, 40) for subject in picture.subjects], labels, values, title)


def _curves(subjects: Sequence[Subject]) -> list[str]:
    norms = [(float(s.step), s.result.total_norm) for s in subjects if s.step is not None and s.result.total_norm]
    cosines = [(float(s.step), s.cosine) for s in subjects if s.step is not None and s.cosine is not None]
    drawn = [curve(norms, "‖ΔW‖ of all weights over steps")] if len(norms) > 1 else []
    if len(cosines) > 1:
        drawn.append(curve(cosines, "cosine with the last step", top=1.0))
    return drawn


def _kept(subject: Subject) -> str:
    result = subject.result
    if result.retained_bf16 is None:
        return ""
    shares = f"{percent(result.retained_bf16)} of the change in bfloat16, {percent(result.retained_fp16)} in float16"
    return f"Rounding would keep {shares}."


def _tables(subject: Subject) -> list[list[str]]:
    def maybe(value: float | None) -> str:
        return "" if value is None else number(value)

    return [
        [
            show(table.weight),
            amount(table.rows_before),
            number(table.norm_before),
            amount(table.changed),
            maybe(table.norm_changed),
            amount(max(0, table.rows_after - table.rows_before)),
            maybe(table.norm_new),
        ]
        for table in subject.result.tables
    ]


_HEADS = {"sigma": "σ₁", "|dW|/|W|": "‖ΔW‖/‖W‖", "bf16": "kept bf16", "fp16": "kept fp16", "median": "‖ΔW‖ median"}


def _modules(subject: Subject) -> _Table:
    head, rows = by_module(subject.result.weights)
    return _Table([_HEADS.get(name, name) for name in head], [[show(cell) for cell in row] for row in rows])


def _config(subject: Subject) -> str:
    if not subject.config:
        return ""
    text = json.dumps(subject.config, indent=2, sort_keys=True, default=str)
    return "\n".join(show(line, 2000) for line in text[:_MOST_CONFIG].splitlines())
