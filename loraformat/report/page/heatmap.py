"""Heat maps as SVG text: module kinds by layers, and steps of a run by layers. Signs say what colors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat.model.results.weight_figures import WeightRecord
from loraformat.report.cells import NO_LAYER, UNKNOWN, ZERO, Cell, Grid, Metric, Scale, margin_label, sign_of
from loraformat.report.page.svg import drawing, text
from loraformat.report.words import number

_LABELLED = 60  # columns, above which cells are too narrow for a sign
_WIDE = 900  # pixels, within which every column is as wide as the longest label
_TOP = 22
UNTRAINED = ", untrained: the update is zero"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where cells stand, in pixels."""

    labels: Sequence[str]
    left: int

    @property
    def columns(self) -> int:
        return len(self.labels)

    @property
    def has_signs(self) -> bool:
        return self.columns <= _LABELLED

    @property
    def width(self) -> int:
        if not self.has_signs:
            return 7
        wanted = max(22, 4 + 7 * max(map(len, self.labels), default=0))
        return wanted if wanted * self.columns <= _WIDE else 22

    @property
    def height(self) -> int:
        return 20 if self.has_signs else 16

    @property
    def right(self) -> int:
        return self.left + self.width * self.columns

    def label_row(self) -> str:
        wanted = max((len(label) for label in self.labels), default=1) * 7 / self.width
        every = next((step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step >= wanted), 256)
        return "".join(
            f'<text class="label" x="{self._middle(at):g}" y="16" text-anchor="middle">{text(label)}</text>'
            for at, label in enumerate(self.labels)
            if at % every == 0
        )

    def row_label(self, row: int, label: str) -> str:
        place = f'x="{self.left - 6}" y="{self._baseline(row)}"'
        return f'<text class="label" {place} text-anchor="end">{text(label)}</text>'

    def margin(self, row: int, label: str) -> str:
        return (
            f'<text class="margin" data-row="{row}" x="{self.right + 6}" y="{self._baseline(row)}">{text(label)}</text>'
        )

    def cell(self, index: int, place: tuple[int, int], css: str, sign: str, title: str) -> str:
        x, y = self.left + place[1] * self.width, _TOP + place[0] * self.height
        box = f'<rect x="{x}" y="{y}" width="{self.width - 1}" height="{self.height - 1}"/>'
        middle = f'x="{x + (self.width - 1) / 2:g}" y="{y + self.height - 6}"'
        label = f'<text {middle} text-anchor="middle">{sign}</text>' if self.has_signs else ""
        return f'<g class="c {css}" data-cell="{index}">{box}{label}<title>{text(title)}</title></g>'

    def _middle(self, column: int) -> float:
        return self.left + (column + 0.5) * self.width

    def _baseline(self, row: int) -> int:
        return _TOP + (row + 1) * self.height - 6


def heat(grid: Grid, metric: Metric, records: Sequence[WeightRecord]) -> str:
    """Rows of module kinds, columns of layers or blocks; each cell has a class of its step, a sign and a title.

    The sign is the step, 0 to 9, "!" for an outlier, "∅" for an untrained weight, which changes nothing, so that the
    map is read without color; where there is no weight there is no cell. Beside each row stand its median and largest
    figure.
    """
    layout = _Layout(grid.columns, 8 + 7 * max((len(row) for row in grid.rows), default=0))
    scale = grid.scale_of(metric)
    parts = [layout.label_row()]
    for row, kind in enumerate(grid.rows):
        parts += [layout.row_label(row, kind), layout.margin(row, margin_label(grid.margins[metric.name][row]))]
    for index, (place, cell) in enumerate(grid.cells.items()):
        value = cell.values.get(metric.name)
        css, sign = _look(value, metric, scale, is_outlier=cell.is_outlier)
        parts.append(layout.cell(index, place, css, sign, cell_title(grid, place, cell, metric, records)))
    size = (layout.right + 130, _TOP + layout.height * len(grid.rows) + 6)
    return drawing(size, "".join(parts), f"{metric.label} of each module kind in each {grid.word}", "heat")


def matrix(rows: Sequence[str], columns: Sequence[str], values: Sequence[Mapping[str, float]], title: str) -> str:
    """Named rows by named columns, with the value in each title: steps of a run by layers.

    Args:
        values: for each row, column → value; log scale, whose ends stand below.
    """
    found = [value for row in values for value in row.values() if value > 0]
    ends = (min(found), max(found)) if found else (0.0, 0.0)
    metric, scale = Metric("", title, "log", max, ""), Scale(*ends, *ends)
    layout = _Layout(columns, 8 + 7 * max(len(row) for row in rows))
    parts = [layout.label_row()]
    for at, (row, cells) in enumerate(zip(rows, values, strict=True)):
        parts.append(layout.row_label(at, row))
        for column, label in enumerate(columns):
            value = cells.get(label)
            if value is not None:
                css, sign = _look(value, metric, scale)
                hint = f"{row}, layer {label}: {number(value)}"
                parts.append(layout.cell(at * len(columns) + column, (at, column), css, sign, hint))
    bottom = _TOP + layout.height * len(rows)
    legend = f"0 is {number(scale.low)}, 9 is {number(scale.high)}, log scale"
    parts.append(f'<text class="label" x="{layout.left}" y="{bottom + 12}">{legend}</text>')
    size = (max(layout.right, layout.left + 240) + 20, bottom + 18)
    return drawing(size, "".join(parts), title, "steps")


def cell_title(grid: Grid, place: tuple[int, int], cell: Cell, metric: Metric, records: Sequence[WeightRecord]) -> str:
    """What a cell says when it is pointed at."""
    value = cell.values.get(metric.name)
    several = f", {metric.word} of {len(cell.records)} weights" if len(cell.records) > 1 else ""
    name = records[cell.records[0]].weight if len(cell.records) == 1 else grid.rows[place[0]]
    mark = ", an outlier among its kind" if cell.is_outlier else ""
    figure = "unknown" if value is None else number(value)
    mark += UNTRAINED if value == 0 and metric.is_log else ""
    label = grid.columns[place[1]]
    is_number = label.replace("-", "").isdigit()
    where = "no layer" if label == NO_LAYER else f"layer {label}" if is_number else label
    return f"{name}, {where}: {metric.label} {figure}{several}{mark}"


def _look(value: float | None, metric: Metric, scale: Scale, *, is_outlier: bool = False) -> tuple[str, str]:
    """(class, sign) of a cell."""
    sign = sign_of(value, metric, scale)
    if sign in (UNKNOWN, ZERO):
        return ("none" if sign == UNKNOWN else "zero", sign)
    return (f"q{sign} out", "!") if is_outlier else (f"q{sign}", sign)
