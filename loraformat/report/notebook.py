"""A report in a notebook: escaped HTML, with a heat map if there are norms; no scripts, no other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loraformat.model.results.weight_figures import WeightRecord
from loraformat.report.cells import grid_of, rows_of
from loraformat.report.page.heatmap import heat
from loraformat.report.page.svg import text

MOST_ROWS = 60
_RAMP = ("#eef3f8", "#dbe8f4", "#bfd8ec", "#9cc5e2", "#73aed5", "#4c95c6", "#2f7ab3", "#1a609c", "#0d477f", "#072c56")
# Colours of their own, so that the map is readable on the light and on the dark ground of a notebook.
_STYLE = (
    ".loraformat svg{font:11px system-ui,sans-serif}.loraformat svg text{fill:currentColor}"
    ".loraformat .c text{font-size:10px;fill:#1b2330}.loraformat .none rect{fill:none;stroke:#888}"
    ".loraformat .zero rect{fill:#fff;stroke:#b3261e;stroke-dasharray:2 2}"
    + "".join(f".loraformat .q{step} rect{{fill:{color}}}" for step, color in enumerate(_RAMP))
    + ",".join(f".loraformat .q{step} text" for step in range(5, 10))
    + "{fill:#fff}"
)


def drawing_of(weights: Sequence[WeightRecord]) -> str:
    """The heat map of layers and modules; "" where no weight has a norm."""
    records = [row.record for row in rows_of(weights)]
    grid = grid_of(records, weights)
    if not grid.metrics:
        return ""
    return f"<style>{_STYLE}</style>{heat(grid, grid.metrics[0], records)}"


def table_of(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows that have the same fields; the first of them, and how many more there are."""
    if not rows:
        return ""
    more = f"<p>and {len(rows) - MOST_ROWS} more: see records()</p>" if len(rows) > MOST_ROWS else ""
    body = "".join(_row("td", row.values()) for row in rows[:MOST_ROWS])
    return f"<table>{_row('th', rows[0])}{body}</table>{more}"


def _row(tag: str, cells: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{'' if cell is None else _cell(cell)}</{tag}>" for cell in cells) + "</tr>"


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else text(value)
