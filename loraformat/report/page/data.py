"""The data in a page, as JSON values: schemas/plot-data.schema.json. Columns instead of records keep it small."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from loraformat.model.results.factor_changes import FactorResult
from loraformat.model.results.plot_data import Picture, Subject
from loraformat.report.cells import Grid, Row, margin_label, steps_of

SCHEMA = "loraformat.plot/1"

COLUMNS = (
    "weights", "kind", "shape", "rank", "scale", "parameters", "norm", "spectral_norm", "stable_rank", "effective_rank",
    "rank_90", "base_norm", "relative_norm", "retained_bf16", "retained_fp16", "is_outlier",
)  # fmt: skip
# Of an adapter that another verb of ours made.
COLUMNS_OF_MADE = (
    "rank_before", "error", "optimum", "energy", "conflicts", "cross_terms", "floor", "retained",
)  # fmt: skip
_MANY = 2000  # rows, above which single spectra are left out and figures have four digits, as the table shows them
_DIGITS = 5


def page_data(picture: Picture, shown: Sequence[tuple[Subject, Sequence[Row], Grid]]) -> dict[str, object]:
    """Everything that the page shows, but for its drawings.

    Args:
        shown: the subjects that are shown weight by weight, the last of the picture last.
    """
    views = [_view(subject, rows, grid) for subject, rows, grid in shown]
    return {
        "schema": SCHEMA,
        "tool": {"name": "loraformat", "version": picture.version},
        "base": picture.base,
        "is_run": picture.is_run,
        "subjects": [_subject(each) for each in picture.subjects],
        "others": views[:-1],
        **views[-1],
    }


def _view(subject: Subject, rows: Sequence[Row], grid: Grid) -> dict[str, object]:
    """The weights of one subject.

    A name is the place of a template in `names` and the numbers that stand for its "{}", and a column that is the same
    everywhere stands in `constants`, so that twenty thousand weights take no more than what tells them apart.
    """
    names: dict[str, int] = {}
    spelled = [_spelled(row.record.weight, names) for row in rows]
    digits = _DIGITS if len(rows) <= _MANY else 4
    columns = COLUMNS if subject.made is None else (*COLUMNS[:-1], *COLUMNS_OF_MADE, COLUMNS[-1])
    figures = [_figures(row, columns[3:-1], digits) for row in rows]
    constants = {
        column: figures[0][at]
        for at, column in enumerate(columns)
        if figures and all(own[at] == figures[0][at] for own in figures)
    }
    varying = [at for at, column in enumerate(columns) if column not in constants]
    figures = [[own[at] for at in varying] for own in figures]
    has_spectra = len(rows) <= _MANY
    return {
        "names": list(names),
        "columns": list(columns),
        "constants": constants,
        "weights": [[*name, *own] for name, own in zip(spelled, figures, strict=True)],
        "spectra": [[_short(v) for v in row.record.singular_values] for row in rows] if has_spectra else [],
        "cells": _cells(grid),
        "base_bins": list(subject.base_bins),
        "update_bins": list(subject.update_bins),
    }


def _subject(subject: Subject) -> dict[str, object]:
    result = subject.result
    return {
        "uri": subject.uri,
        "label": subject.label,
        "step": subject.step,
        "format": subject.format,
        "weights": subject.summary.weights,
        "parameters": subject.summary.parameters,
        "norm": _short(result.total_norm),
        "relative_norm": _short(result.total_relative_norm),
        "cosine_to_last": _short(subject.cosine),
        "layer_norms": {str(layer): _short(norm) for layer, norm in result.layer_norms.items()},
        "components": [
            {
                "component": each.component,
                "weights": each.weights,
                "ranks": {str(rank): count for rank, count in each.ranks.items()},
                "parameters": each.parameters,
                "norm": _short(each.norm),
                "relative_norm": _short(each.relative_norm),
            }
            for each in subject.components
        ],
        "made": None if subject.made is None else _made(subject.made_by, subject.made),
        "findings": [f"{each.code} {each.where}: {each.message}" for each in subject.findings],
    }


def _made(verb: str, made: FactorResult) -> dict[str, object]:
    """What the verb reported of the whole adapter; the figures of its weights are columns."""
    return {
        "verb": verb,
        "method": made.method,
        "adapters": [[uri, weight] for uri, weight in made.adapters],
        "models": list(made.models),
        "kept": list(made.kept),
        "left_out": list(made.left_out),
        "cosines": [[first, second, _short(cosine)] for first, second, cosine in made.cosines],
        "bytes_before": made.bytes_before,
        "bytes_written": made.bytes_written,
        **{name: _short(getattr(made, name)) for name in ("norm", "dropped", *COLUMNS_OF_MADE[1:])},
    }


def _spelled(name: str, names: dict[str, int]) -> tuple[int, str]:
    """(place of the template, its numbers joined by dots)."""
    template = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name.replace("{}", "{ }"))
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return names.setdefault(template, len(names)), ".".join(numbers)


def _figures(row: Row, names: Sequence[str], digits: int) -> list[object]:
    record = row.record
    figures = [_short(getattr(record, name), digits) for name in names]
    return [row.weights, record.kind, "×".join(map(str, record.shape)), *figures, int(record.is_outlier)]


def _cells(grid: Grid) -> dict[str, object]:
    """Figures of the cells by metric, in the order of the drawing."""
    return {
        "metrics": [
            {"name": metric.name, "label": metric.label, "scale": metric.scale, "word": metric.word}
            for metric in grid.metrics
        ],
        "values": {
            metric.name: [_short(cell.values.get(metric.name)) for cell in grid.cells.values()]
            for metric in grid.metrics
        },
        "steps": {metric.name: "".join(steps_of(grid, metric)) for metric in grid.metrics},
        "scales": {
            metric.name: [_short(end) for end in (scale.low, scale.high, scale.least, scale.largest)]
            for metric in grid.metrics
            for scale in [grid.scale_of(metric)]
        },
        "margins": {name: [margin_label(pair) for pair in pairs] for name, pairs in grid.margins.items()},
        "rows": [row for row, _ in grid.cells],
        "first": [cell.records[0] for cell in grid.cells.values()],
        "weights": [len(cell.records) for cell in grid.cells.values()],
    }


def _short(value: object, digits: int = _DIGITS) -> object:
    """A float in a few digits; what is not finite as null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
