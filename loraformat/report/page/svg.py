"""Drawings as SVG text: bands of spectra, histograms, curves. No styles inside: the classes of the page rule."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat.diagnostics import show
from loraformat.report.cells import Band
from loraformat.report.words import number


def text(value: object) -> str:
    """A value as text that is safe in SVG and HTML."""
    return html.escape(show(value))


@dataclass(frozen=True, slots=True)
class _Plot:
    """A rectangle with axes: data to pixels."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 44
    top: float = 18

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1) * self.width

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height - (value - low) / ((high - low) or 1) * self.height

    def frame(self, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], title: str) -> str:
        bottom, right = self.top + self.height, self.left + self.width
        parts = [
            f'<path class="axis" d="M{self.left:g} {self.top:g}V{bottom:g}H{right:g}"/>',
            f'<text class="caption" x="{self.left:g}" y="12">{text(title)}</text>',
        ]
        for value, label in x_ticks.items():
            place = f'x="{self.x(value):.1f}" y="{bottom + 14:g}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{text(label)}</text>')
        for value, label in y_ticks.items():
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left:g} {y:.1f}H{right:g}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 5:g}" y="{y + 4:.1f}" text-anchor="end">{text(label)}</text>'
            )
        return "".join(parts)

    def line(self, points: Sequence[tuple[float, float]], css: str) -> str:
        return f'<path class="{css}" d="{self._path(points)}"/>'

    def dot(self, point: tuple[float, float], title: str) -> str:
        place = f'cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}"'
        return f'<circle class="dot" {place} r="3"><title>{text(title)}</title></circle>'

    def area(self, lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]]) -> str:
        return f'<path class="band" d="{self._path([*lower, *reversed(upper)])}Z"/>'

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def spectra(bands: Sequence[Band]) -> list[str]:
    """A small plot for each module kind: the median singular value at each place in a band of 10 to 90 %, log scale."""
    values = [value for band in bands for place in band.places for value in place if value > 0]
    if not values:
        return []
    top = math.ceil(math.log10(max(values)))
    # Six decades hold all that is not noise of float32 factors.
    bottom = max(math.floor(math.log10(min(values))), top - 6)
    return [_spectrum(band, bottom, top) for band in bands]


def _spectrum(band: Band, bottom: int, top: int) -> str:
    count = len(band.places)
    plot = _Plot(170, 96, (1, max(2, count)), (bottom, top))
    points = [[(at, _log(place[which], bottom)) for at, place in enumerate(band.places, 1)] for which in range(3)]
    y_ticks = _few({exponent: f"{10.0**exponent:g}" for exponent in range(bottom, top + 1)}, 4)
    frame = plot.frame({1: "1", count: str(count)}, y_ticks, f"{band.module} ({band.weights})")
    body = frame + plot.area(points[0], points[2]) + plot.line(points[1], "line")
    if count == 1:  # a line of one place has no length
        body += plot.line([points[0][0], points[2][0]], "line") + plot.dot(points[1][0], number(band.places[0][1]))
    return drawing((236, 136), body, f"singular values of {band.module}", "small")


def _log(value: float, bottom: int) -> float:
    return math.log10(value) if value > 10.0**bottom else float(bottom)


_RARE = 2e-4


def histogram(base: Sequence[int], update: Sequence[int]) -> str:
    """Shares of values by the power of two of their size: of W solid, of ΔW dashed."""
    used = [at for bins in (base, update) for at, count in enumerate(bins) if count > _RARE * sum(bins) and at > 0]
    if not used:
        return ""
    low, high = max(min(used), max(used) - 60) - 1, max(used) + 1
    shares = [[(at - 127, bins[at] / (sum(bins) or 1)) for at in range(low, high + 1)] for bins in (base, update)]
    most = max(share for line in shares for _, share in line)
    plot = _Plot(560, 150, (low - 127, high - 127), (0, most))
    x_ticks = _few({exponent: f"2^{exponent}" for exponent in range(low - 127, high - 126)}, 9)
    y_ticks = {0: "0", most / 2: f"{most / 2:.0%}", most: f"{most:.0%}"}
    body = plot.frame(x_ticks, y_ticks, "share of values by size: W solid, ΔW dashed")
    body += plot.line(shares[0], "line") + plot.line(shares[1], "line dashed")
    for line, label in zip(shares, ("W", "ΔW"), strict=True):
        x, y = max(line, key=lambda point: point[1])
        body += f'<text class="name" x="{plot.x(x):.1f}" y="{plot.y(y) - 4:.1f}" text-anchor="middle">{label}</text>'
    return drawing((630, 200), body, "how large the values of W and of its change are", "wide")


def curve(points: Sequence[tuple[float, float]], title: str, *, top: float | None = None) -> str:
    """A line over the steps of a run, with a dot at each; the axis has zero on it, so that slopes are what they seem.

    Args:
        top: upper end of the axis; the largest value where None.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(0.0, *ys), max(ys) if top is None else top
    plot = _Plot(250, 110, (min(xs), max(xs) if len(set(xs)) > 1 else min(xs) + 1), (low, high))
    x_ticks = _few({x: f"{x:g}" for x in sorted(set(xs))}, 5)
    body = plot.frame(x_ticks, {value: number(value) for value in (low, (low + high) / 2, high)}, title)
    body += plot.line(points, "line")
    body += "".join(plot.dot(point, f"{point[0]:g}: {number(point[1])}") for point in points)
    return drawing((316, 156), body, title, "small")


def _few(ticks: Mapping[float, str], most: int) -> dict[float, str]:
    every = max(1, math.ceil(len(ticks) / most))
    return {value: label for at, (value, label) in enumerate(ticks.items()) if at % every == 0}


def drawing(size: tuple[float, float], body: str, title: str, css: str) -> str:
    """An SVG element of a size in pixels; `title` says what it shows to those who do not see it."""
    width, height = size
    return (
        f'<svg class="{css}" role="img" aria-label="{text(title)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{body}</svg>'
    )
