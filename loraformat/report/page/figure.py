"""A figure for papers, drawn by matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

from loraformat.diagnostics import show
from loraformat.errors import MissingExtra
from loraformat.model.results.plot_data import Picture, Subject
from loraformat.report.cells import Cell, Grid, Metric, bands_of, grid_of, rows_of
from loraformat.report.words import counts, cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osv^Dx+*"
_FONT = "DejaVu Sans"


def require_matplotlib() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtra(
            "this format needs matplotlib", where="plot", hint="pip install 'loraformat[plot]', or write .html"
        ) from error
    del mpl


def render_figure(picture: Picture, form: str) -> bytes:
    """Heat maps of layers and modules, and singular values, as "svg", "png" or "pdf"; the same bytes every time.

    A column for each adapter; of the checkpoints of a run the last.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    grids = [_grid(subject) for subject in picture.shown]
    # Fixed, since figures otherwise carry the time and random names.
    settings = {
        "svg.hashsalt": "loraformat",
        "svg.fonttype": "none",
        "font.family": _FONT,
        "font.size": 8,
        "hatch.linewidth": 0.6,
    }
    metadata: dict[str, dict[str, str | None]] = {
        "svg": {"Date": None, "Creator": "loraformat"},
        "pdf": {"CreationDate": None, "Creator": "loraformat"},
        "png": {"Software": "loraformat"},
    }
    with mpl.rc_context(settings):
        widths = [min(14.0, max(6.0, 2.2 + 0.16 * len(grid.columns))) for grid in grids]
        height = 1.6 + 0.2 * max(len(grid.rows) for grid in grids)
        figure = Figure(figsize=(sum(widths), height + 2.6), layout="constrained")
        places = figure.subplots(2, len(grids), squeeze=False, height_ratios=[height, 2.6], width_ratios=widths)
        for (upper, lower), subject, grid in zip(places.T, picture.shown, grids, strict=True):
            _heat(figure, upper, grid)
            _spectra(lower, subject)
            upper.set_title(_plain(f"{show(subject.uri, 120)}\n{_verdict(subject)}"), fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata=metadata[form])
    return buffer.getvalue()


def _grid(subject: Subject) -> Grid:
    weights = subject.result.weights
    return grid_of([row.record for row in rows_of(weights)], weights)


def _verdict(subject: Subject) -> str:
    """How many findings there are, and their codes."""
    codes = sorted({finding.code for finding in subject.findings})
    return f"{counts(subject.findings)}: {cut(codes)}" if codes else "no findings"


def _heat(figure: Figure, axes: Axes, grid: Grid) -> None:
    from matplotlib.colors import LogNorm

    if not grid.metrics:
        axes.text(0.5, 0.5, "no norms: a scale is unknown", ha="center", va="center")
        axes.set_axis_off()
        return
    metric = grid.metrics[0]
    scale = grid.scale_of(metric)
    low, high = scale.low, scale.high
    norm = LogNorm(low, high) if high > low else None
    image = axes.imshow(_matrix(grid, metric), aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(grid.rows)), [_plain(show(row, 40)) for row in grid.rows])
    every = max(1, len(grid.columns) // 16)
    places = list(range(0, len(grid.columns), every))
    axes.set_xticks(places, [grid.columns[at] for at in places])
    untrained = "hatched ∅: untrained, the update is zero"
    axes.set_xlabel(f"{grid.word}   ({untrained})" if grid.has_untrained(metric) else grid.word)
    if high > 0:
        cut = (scale.least < low, scale.largest > high)
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(cut, "neither")
        figure.colorbar(image, ax=axes, label="|ΔW| (Frobenius)", fraction=0.04, pad=0.01, extend=extend)
    for (row, column), cell in grid.cells.items():
        _mark(axes, (column, row), cell, cell.values.get(metric.name))


def _mark(axes: Axes, place: tuple[int, int], cell: Cell, value: float | None) -> None:
    """A sign where the color does not say it: an outlier, an untrained weight, a weight whose figure is unknown."""
    from matplotlib.patches import Rectangle

    if value:
        sign, color = "!" if cell.is_outlier else "", "red"
    else:
        sign, color = "?" if value is None else "∅", "dimgray"
        corner = place[0] - 0.5, place[1] - 0.5
        hatch = "" if value is None else "////"
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="whitesmoke", edgecolor="darkgray", hatch=hatch, lw=0))
    if sign:
        axes.text(*place, sign, ha="center", va="center", color=color, fontweight="bold")


def _matrix(grid: Grid, metric: Metric) -> list[list[float]]:
    """Figures by row and column; NaN, which is not colored, where there is none or where the scale has no place."""
    missing = float("nan")
    return [
        [
            (grid.cells[row, column].values.get(metric.name) or missing) if (row, column) in grid.cells else missing
            for column in range(len(grid.columns))
        ]
        for row in range(len(grid.rows))
    ]


def _spectra(axes: Axes, subject: Subject) -> None:
    from matplotlib.ticker import MaxNLocator

    every = bands_of(subject.result.weights)
    if not any(place[1] > 0 for band in every for place in band.places):
        axes.text(0.5, 0.5, "all singular values are zero" if every else "no singular values", ha="center", va="center")
        axes.set_axis_off()
        return
    for number, band in enumerate(every[: len(_MARKERS)]):
        places = range(1, len(band.places) + 1)
        median = [place[1] or float("nan") for place in band.places]  # a logarithm has no zero: a gap
        axes.plot(places, median, marker=_MARKERS[number], ms=3, lw=1, label=_plain(show(band.module, 40)))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    more = len(every) - len(_MARKERS)
    axes.set_xlabel(f"index   ({more} more module kinds are not shown)" if more > 0 else "index")
    axes.set_ylabel("singular value (median)")
    axes.legend(ncols=2, fontsize=7)


def _plain(text: str) -> str:
    r"""Text that matplotlib shows as it is: not as mathematics, not left out, without letters that its font lacks.

    Those come out as `\uNNNN`, as they would on a terminal that lacks them: an empty box tells nothing.
    """
    known = _letters()
    shown = "".join(each if each == "\n" or ord(each) in known else ascii(each)[1:-1] for each in text)
    hidden = " " if shown.startswith("_") else ""  # what begins so is left out of legends
    return hidden + shown.replace("$", r"\$")


@lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_FONT)).get_charmap())
