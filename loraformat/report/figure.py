"""A figure for papers, drawn by matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from loraformat.diagnostics import show
from loraformat.errors import MissingExtra
from loraformat.model.pictures import Picture
from loraformat.report.cells import Grid, Metric, bands_of, grid_of, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osv^Dx+*"


def require_matplotlib() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtra(
            "this form needs matplotlib", where="plot", hint="pip install 'loraformat[plot]', or write .html"
        ) from error
    del mpl


def render_figure(picture: Picture, form: str) -> bytes:
    """The heat map of layers and modules, and singular values, as "svg", "png" or "pdf"; the same bytes every time."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    records = [row.record for row in rows_of(picture.main.result.weights)]
    grid = grid_of(records)
    # Fixed, since figures otherwise carry the time and random names.
    settings = {"svg.hashsalt": "loraformat", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8}
    metadata: dict[str, dict[str, str | None]] = {
        "svg": {"Date": None, "Creator": "loraformat"},
        "pdf": {"CreationDate": None, "Creator": "loraformat"},
        "png": {"Software": "loraformat"},
    }
    with mpl.rc_context(settings):
        width = min(14.0, max(6.0, 2.2 + 0.16 * len(grid.columns)))
        height = 1.4 + 0.2 * len(grid.rows)
        figure = Figure(figsize=(width, height + 2.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[height, 2.6])
        _heat(figure, upper, grid)
        _spectra(lower, picture)
        figure.suptitle(_plain(show(picture.main.uri, 120)), fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata=metadata[form])
    return buffer.getvalue()


def _heat(figure: Figure, axes: Axes, grid: Grid) -> None:
    from matplotlib.colors import LogNorm

    if not grid.metrics:
        axes.text(0.5, 0.5, "no norms: a scale is unknown", ha="center", va="center")
        axes.set_axis_off()
        return
    metric = grid.metrics[0]
    low, high = grid.range_of(metric)
    values = _matrix(grid, metric)
    norm = LogNorm(low, high) if high > low else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(grid.rows)), [_plain(show(row, 40)) for row in grid.rows])
    every = max(1, len(grid.columns) // 16)
    places = list(range(0, len(grid.columns), every))
    axes.set_xticks(places, [grid.columns[at] for at in places])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="|ΔW| (Frobenius)", fraction=0.04, pad=0.01)
    for (row, column), cell in grid.cells.items():
        if cell.is_outlier:
            axes.text(column, row, "!", ha="center", va="center", color="red", fontweight="bold")


def _matrix(grid: Grid, metric: Metric) -> list[list[float]]:
    missing = float("nan")
    return [
        [
            grid.cells[row, column].values.get(metric.name, missing) if (row, column) in grid.cells else missing
            for column in range(len(grid.columns))
        ]
        for row in range(len(grid.rows))
    ]


def _spectra(axes: Axes, picture: Picture) -> None:
    bands = bands_of(picture.main.result.weights)[: len(_MARKERS)]
    for number, band in enumerate(bands):
        places = range(1, len(band.places) + 1)
        median = [max(place[1], 1e-30) for place in band.places]
        axes.plot(places, median, marker=_MARKERS[number], ms=3, lw=1, label=_plain(show(band.module, 40)))
    axes.set_yscale("log")
    axes.set_xlabel("place")
    axes.set_ylabel("singular value (median)")
    if bands:
        axes.legend(ncols=2, fontsize=7)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
