"""Records of weights as a grid of module kinds by layers, as rows of a table, as bands of spectra; experts folded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeGuard

from loraformat.model.results.weight_figures import WeightRecord, module_kind
from loraformat.model.summary import layer_of
from loraformat.report.words import known, middle, number

MOST_COLUMNS = 160
MOST_ROWS = 60
STEPS = 10
NO_LAYER = "–"


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that cells may show.

    Attributes:
        name: of the field of a WeightRecord, or of a class derived from it.
        label: what people read.
        scale: "log" or "linear".
        fold: how several weights of one cell become one figure, and the word for it.
    """

    name: str
    label: str
    scale: str
    fold: Callable[[Sequence[float]], float]
    word: str

    @property
    def is_log(self) -> bool:
        """Whether its scale is logarithmic, on which zero has no place."""
        return self.scale == "log"

    def step(self, value: float, low: float, high: float) -> int | None:
        """0 to STEPS - 1: where a value stands between the least and the largest; None for zero on a log scale."""
        if self.is_log and value <= 0:
            return None
        if high <= low:
            return STEPS - 1
        place = math.log(value / low) / math.log(high / low) if self.is_log else (value - low) / (high - low)
        return min(STEPS - 1, max(0, int(place * STEPS)))


METRICS = (
    Metric("norm", "‖ΔW‖", "log", max, "largest"),
    Metric("relative_norm", "‖ΔW‖ / ‖W‖", "log", max, "largest"),
    Metric("spectral_norm", "σ₁", "log", max, "largest"),
    Metric("effective_rank", "effective rank", "linear", median, "median"),
    Metric("stable_rank", "stable rank", "linear", median, "median"),
    Metric("retained_bf16", "kept in bfloat16", "linear", min, "least"),
    Metric("retained_fp16", "kept in float16", "linear", min, "least"),
    Metric("rank", "rank", "linear", max, "largest"),
    # Of adapters that another verb of ours made: model.results.plot_data.MadeRecord.
    Metric("error", "error / ‖ΔW‖", "linear", max, "largest"),
    Metric("energy", "energy kept", "linear", min, "least"),
    Metric("conflicts", "opposite signs", "linear", max, "largest"),
    Metric("cross_terms", "off Σ w·ΔW", "linear", max, "largest"),
    Metric("retained", "kept if merged back", "linear", min, "least"),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """The ends of a scale of colors, and the least and largest value; those beyond an end have its color.

    >>> scale_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0], is_log=False)
    Scale(low=1.0, high=7.0, least=1.0, largest=1000.0)
    """

    low: float = 0.0
    high: float = 0.0
    least: float = 0.0
    largest: float = 0.0


# Quartiles and this many times their distance hold all values but those that stand far apart.
_FENCE = 3.0
# Of the whole range: where the values inside the fence fill less, the others would take most of the colors from them.
_LEAST_SHARE_OF_RANGE = 0.5
_FEWEST = 8  # values: of fewer, quartiles say little about which stand apart


def scale_of(values: Sequence[float], *, is_log: bool) -> Scale:
    """A scale for some values, positive ones where `is_log`: from the least to the largest but for the few far away."""
    if not values:
        return Scale()
    ordered = sorted(values)
    if len(ordered) < _FEWEST:
        return Scale(ordered[0], ordered[-1], ordered[0], ordered[-1])
    places = [math.log(value) for value in ordered] if is_log else ordered
    low, high = _quantile(places, 0.25), _quantile(places, 0.75)
    reach = _FENCE * (high - low)
    inner = [at for at, place in enumerate(places) if low - reach <= place <= high + reach]
    least, largest = ordered[0], ordered[-1]
    if places[inner[-1]] - places[inner[0]] >= _LEAST_SHARE_OF_RANGE * (places[-1] - places[0]) or not reach:
        return Scale(least, largest, least, largest)
    return Scale(ordered[inner[0]], ordered[inner[-1]], least, largest)


@dataclass(slots=True)
class Cell:
    """The weights of one module kind in one column.

    Attributes:
        records: places in the sequence of records that the grid was made from.
        values: metric name → figure.
    """

    records: list[int] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    is_outlier: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of module kinds, columns of layers.

    Attributes:
        metrics: those that at least one cell has; the rank where it differs.
        rows: module kinds, sorted.
        columns: labels: a layer or block, or the first and last of several.
        cells: (row, column) → cell, where there is one.
        margins: metric name → (median, largest) of the weights of each row; None where none has the figure.
        left_out: module kinds that have no row.
    """

    metrics: tuple[Metric, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Cell]
    margins: Mapping[str, Sequence[tuple[float, float] | None]]
    left_out: int = 0

    @property
    def word(self) -> str:
        """What a column is."""
        are_numbers = all(label == NO_LAYER or label.replace("-", "").isdigit() for label in self.columns)
        return "layer" if are_numbers else "block"

    def scale_of(self, metric: Metric) -> Scale:
        """The ends of the scale that the cells of a figure are drawn on."""
        found = [cell.values[metric.name] for cell in self.cells.values() if metric.name in cell.values]
        return scale_of([value for value in found if value > 0 or not metric.is_log], is_log=metric.is_log)

    def has_untrained(self, metric: Metric) -> bool:
        """Whether a cell has the figure zero, which has no place on its scale."""
        return metric.is_log and any(cell.values.get(metric.name) == 0 for cell in self.cells.values())


UNKNOWN, ZERO = "?", "∅"


def steps_of(grid: Grid, metric: Metric) -> list[str]:
    """A sign for each cell: the step of its color, UNKNOWN, or ZERO, which has no place on a logarithmic scale."""
    scale = grid.scale_of(metric)
    return [sign_of(cell.values.get(metric.name), metric, scale) for cell in grid.cells.values()]


def sign_of(value: float | None, metric: Metric, scale: Scale) -> str:
    """The sign of one value; see `steps_of`."""
    if value is None:
        return UNKNOWN
    step = metric.step(value, scale.low, scale.high)
    return ZERO if step is None else str(step)


def column_of(record: WeightRecord) -> str:
    """Where a weight stands: its block of an image model, or the number of its layer; "" for neither."""
    layer = layer_of(record.weight)
    return record.block or ("" if layer is None else str(layer))


def columns_of(records: Iterable[WeightRecord]) -> list[str]:
    """All blocks and layers, in the order of the model."""
    from loraformat.naming.families import block_order

    found = {column_of(record): bool(record.block) for record in records}
    found.pop("", None)
    return sorted(found, key=lambda label: block_order(label) if found[label] else (2, 0, int(label)))


def grid_of(records: Sequence[WeightRecord], weights: Sequence[WeightRecord] | None = None) -> Grid:
    """The cells of weights; those of no block and no numbered layer stand in a last column.

    Args:
        records: what the cells are made of, experts folded where they are many.
        weights: every weight by itself, for the margins; `records` where None.
    """
    columns = columns_of(records)
    size = max(1, math.ceil(len(columns) / MOST_COLUMNS))
    bins = [columns[at : at + size] for at in range(0, len(columns), size)]
    place = {label: at for at, bin_ in enumerate(bins) for label in bin_}
    labels = [bin_[0] if len(bin_) == 1 else f"{bin_[0]}-{bin_[-1]}" for bin_ in bins]
    if any(not column_of(record) for record in records):
        labels.append(NO_LAYER)
    kinds = sorted({record.module for record in records})
    rows = {kind: at for at, kind in enumerate(kinds[:MOST_ROWS])}
    cells: dict[tuple[int, int], Cell] = {}
    for at, record in enumerate(records):
        column = place.get(column_of(record), len(labels) - 1)
        if record.module in rows:
            cells.setdefault((rows[record.module], column), Cell()).records.append(at)
    for cell in cells.values():
        _fill(cell, [records[at] for at in cell.records])
    metrics = tuple(metric for metric in METRICS if _is_drawn(metric, cells.values()))
    return Grid(
        metrics=metrics,
        rows=tuple(rows),
        columns=tuple(labels),
        cells=dict(sorted(cells.items())),
        margins=_margins(records if weights is None else weights, rows, metrics),
        left_out=len(kinds) - len(rows),
    )


def _is_drawn(metric: Metric, cells: Iterable[Cell]) -> bool:
    """Whether a cell has the figure; a rank that is the same everywhere is on the card already."""
    values = {cell.values[metric.name] for cell in cells if metric.name in cell.values}
    return len(values) > (metric.name == "rank")


def _margins(
    weights: Sequence[WeightRecord], rows: Mapping[str, int], metrics: Sequence[Metric]
) -> dict[str, list[tuple[float, float] | None]]:
    """Median and largest as the table of modules has them: over the weights, untrained ones included."""
    groups: dict[str, list[WeightRecord]] = {kind: [] for kind in rows}
    for weight in weights:
        if weight.module in groups:
            groups[weight.module].append(weight)
    return {metric.name: [_margin(group, metric) for group in groups.values()] for metric in metrics}


def _margin(group: Sequence[WeightRecord], metric: Metric) -> tuple[float, float] | None:
    found = known(getattr(weight, metric.name, None) for weight in group)
    return (middle(found) or 0.0, max(found)) if found else None


def margin_label(margin: tuple[float, float] | None) -> str:
    """Median and largest figure of a row, in the digits of the table of modules."""
    return "" if margin is None else f"{number(margin[0])} · {number(margin[1])}"


def _fill(cell: Cell, records: Sequence[WeightRecord]) -> None:
    for metric in METRICS:
        figures: list[float | None] = [getattr(record, metric.name, None) for record in records]
        found = [value for value in figures if _is_shown(value)]
        if found:
            cell.values[metric.name] = metric.fold(found)
    cell.is_outlier = any(record.is_outlier for record in records)


def _is_shown(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


_EXPERT = re.compile(r"\.experts\.\d{1,9}\.")
_MOST_EXPERTS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A weight as the table has it, or the experts of one layer and module folded into one.

    Attributes:
        weights: how many it stands for.
        record: of the weight; of experts the largest norms, median ranks, least retention, and the sum of parameters.
    """

    record: WeightRecord
    weights: int = 1


def rows_of(records: Sequence[WeightRecord]) -> list[Row]:
    """Rows in the order of the records; experts of one layer and module are folded where they are many."""
    groups: dict[tuple[str, str], list[WeightRecord]] = {}
    for at, record in enumerate(records):
        name = _EXPERT.sub(".experts.*.", record.weight)
        # A weight that is no expert stands alone, also where it has several updates.
        groups.setdefault((name, record.kind if name != record.weight else str(at)), []).append(record)
    rows: list[Row] = []
    for (name, _), group in groups.items():
        if len(group) > _MOST_EXPERTS:
            rows.append(Row(_folded(name, group), len(group)))
        else:
            rows += [Row(record) for record in group]
    return rows


def _folded(name: str, group: Sequence[WeightRecord]) -> WeightRecord:
    """One record for a group: each figure of METRICS folded, those that do not fold unknown."""
    cell = Cell()
    _fill(cell, group)
    first = group[0]
    unknown = {each: None for each in _UNFOLDED if hasattr(first, each)}
    folded = {metric.name: cell.values.get(metric.name) for metric in METRICS if hasattr(first, metric.name)}
    changes: dict[str, Any] = {**unknown, **folded, "rank": first.rank}
    return replace(
        first,
        weight=name,
        parameters=sum(record.parameters for record in group),
        singular_values=(),
        is_outlier=cell.is_outlier,
        **changes,
    )


_UNFOLDED = ("rank_90", "base_norm", "rank_before", "optimum", "floor")


@dataclass(frozen=True, slots=True)
class Band:
    """Singular values of the weights of one module kind, place by place: (10 %, median, 90 %)."""

    module: str
    weights: int
    places: tuple[tuple[float, float, float], ...]


def bands_of(records: Iterable[WeightRecord]) -> list[Band]:
    """A band for each module kind whose weights have singular values, sorted by name."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for record in records:
        if record.singular_values:
            groups.setdefault(module_kind(record.weight), []).append(record.singular_values)
    return [Band(kind, len(found), tuple(_places(found))) for kind, found in sorted(groups.items())]


def _places(spectra: Sequence[Sequence[float]]) -> Iterable[tuple[float, float, float]]:
    for at in range(max(map(len, spectra))):
        found = sorted(values[at] for values in spectra if at < len(values))
        yield _quantile(found, 0.1), _quantile(found, 0.5), _quantile(found, 0.9)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
