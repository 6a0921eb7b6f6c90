"""Tables of the weights of an adapter: one by one, by module or by layer, and rows of heat over the layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from loraformat.model.results.verbs import InspectResult
from loraformat.model.results.weight_figures import WeightRecord
from loraformat.model.summary import layer_of
from loraformat.model.updates import kind_named
from loraformat.report.cells import column_of, columns_of
from loraformat.report.lines import Page, Styled
from loraformat.report.words import amount, figure, histogram, kind_name, known, middle, number, percent, runs, shape

# More rows than a screen has are grouped; the JSON lists every weight.
MOST_ROWS = 40

# Without ":" and "#", which are escaped where two stand together: they begin commands of CI services.
RAMP = ".~-=+*&%@"
_ZERO, _UNKNOWN = "0", "?"
# What a narrow terminal does without, in this order; the first column is cut before.
_DISPENSABLE = ("stable", "shape", "update", "scale", "layers", "fp16", "parameters", "bf16", "sigma", "rank")


def say_weights(page: Page, result: InspectResult) -> None:
    """The weights in the grouping asked for, and the heat where it was."""
    grouping = result.grouping
    if grouping == "auto":
        grouping = "none" if len(result.weights) <= MOST_ROWS else "module"
    tables = {"none": _weights, "module": by_module, "layer": _layers, "block": _blocks}
    head, rows = tables[grouping](result.weights)
    page.fitted_table(head, rows, _DISPENSABLE)
    if any(record.is_outlier for record in result.weights):
        from loraformat.algebra.outliers import LEAST_SCORE

        text = f"outlier among the weights of its module kind (robust z of log norm above {LEAST_SCORE})"
        page.flow("  ! ", Styled(text, "dim"))
    if result.has_heat:
        say_heat(page, result.weights)


def _is_scaled(record: WeightRecord) -> bool:
    kind = kind_named(record.kind)
    return kind is not None and kind.has_scale


def _weights(weights: Sequence[WeightRecord]) -> tuple[list[str], list[list[str]]]:
    has = _Known(weights)
    head = ["weight", "update", "shape", "rank", "scale", "parameters", *has.columns]
    rows = [
        [
            record.weight,
            kind_name(record.kind),
            shape(record.shape),
            "-" if record.rank is None else str(record.rank),
            number(record.scale) if _is_scaled(record) else "-",
            amount(record.parameters),
            *has.cells(record),
        ]
        for record in weights
    ]
    return head, rows


class _Known:
    """Which figures the records have, and their cells."""

    def __init__(self, weights: Sequence[WeightRecord]) -> None:
        columns: list[tuple[str, Callable[[WeightRecord], str]]] = []
        if any(record.norm is not None for record in weights):
            columns.append(("norm", _norm))
        if any(record.spectral_norm is not None for record in weights):
            columns += [
                ("sigma", lambda record: figure(record.spectral_norm)),
                ("eff.rank", lambda record: figure(record.effective_rank)),
                ("stable", lambda record: figure(record.stable_rank)),
            ]
        if any(record.relative_norm is not None for record in weights):
            columns += [
                ("|dW|/|W|", lambda record: percent(record.relative_norm)),
                ("bf16", lambda record: percent(record.retained_bf16)),
                ("fp16", lambda record: percent(record.retained_fp16)),
            ]
        self._columns = columns

    @property
    def columns(self) -> list[str]:
        return [name for name, _ in self._columns]

    def cells(self, record: WeightRecord) -> list[str]:
        return [cell(record) for _, cell in self._columns]


def _norm(record: WeightRecord) -> str:
    if record.norm is None and not _is_scaled(record):
        return "-"
    return number(record.norm) + (" !" if record.is_outlier else "")


def by_module(weights: Sequence[WeightRecord]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a table in which weights that differ in the layer only are one line."""
    groups: dict[tuple[str, str, str], list[WeightRecord]] = {}
    for record in weights:
        groups.setdefault((record.module, kind_name(record.kind), shape(record.shape)), []).append(record)
    columns = _group_columns(weights)
    head = ["module", "update", "shape", "weights", "layers", "rank", "parameters", *(name for name, _ in columns)]
    rows = [
        [
            *key,
            amount(len(group)),
            runs(_numbers(group)) or "-",
            histogram(_counts(record.rank for record in group)),
            amount(sum(record.parameters for record in group)),
            *(cell(group) for _, cell in columns),
        ]
        for key, group in groups.items()
    ]
    return head, rows


def _layers(weights: Sequence[WeightRecord]) -> tuple[list[str], list[list[str]]]:
    """One line for each layer; what belongs to none comes last."""
    groups: dict[int | None, list[WeightRecord]] = {}
    for record in weights:
        groups.setdefault(layer_of(record.weight), []).append(record)
    ordered = sorted(groups.items(), key=lambda pair: (pair[0] is None, pair[0] or 0))
    return _lines("layer", [("none" if layer is None else str(layer), group) for layer, group in ordered], weights)


def _blocks(weights: Sequence[WeightRecord]) -> tuple[list[str], list[list[str]]]:
    """One line for each block of an image model, or for each layer of another; what belongs to none comes last."""
    groups: dict[str, list[WeightRecord]] = {label: [] for label in columns_of(weights)}
    for record in weights:
        groups.setdefault(column_of(record), []).append(record)
    return _lines("block", [(label or "none", group) for label, group in groups.items()], weights)


def _lines(
    head: str, groups: Sequence[tuple[str, Sequence[WeightRecord]]], weights: Sequence[WeightRecord]
) -> tuple[list[str], list[list[str]]]:
    columns = _group_columns(weights)
    rows = [
        [
            label,
            amount(len(group)),
            histogram(_counts(record.rank for record in group)),
            amount(sum(record.parameters for record in group)),
            *(cell(group) for _, cell in columns),
        ]
        for label, group in groups
    ]
    return [head, "weights", "rank", "parameters", *(name for name, _ in columns)], rows


_Group = Sequence[WeightRecord]


def _group_columns(weights: _Group) -> list[tuple[str, Callable[[_Group], str]]]:
    columns: list[tuple[str, Callable[[_Group], str]]] = []
    if any(record.norm is not None for record in weights):
        columns += [("median", lambda group: _median(record.norm for record in group)), ("largest", _largest)]
    if any(record.spectral_norm is not None for record in weights):
        columns += [
            ("sigma", lambda group: _most(record.spectral_norm for record in group)),
            ("eff.rank", lambda group: _median(record.effective_rank for record in group)),
        ]
    if any(record.relative_norm is not None for record in weights):
        columns += [
            ("|dW|/|W|", lambda group: percent(middle(record.relative_norm for record in group))),
            ("bf16", lambda group: percent(min(known(record.retained_bf16 for record in group), default=None))),
            ("fp16", lambda group: percent(min(known(record.retained_fp16 for record in group), default=None))),
        ]
    return columns


def _largest(group: _Group) -> str:
    """The largest norm of a group and the layer where it stands; "?" where none is known."""
    found = max(group, key=lambda record: -1.0 if record.norm is None else record.norm)
    layer = column_of(found)
    is_one = len(group) == 1 or (found.block and all(record.block == found.block for record in group))
    place = "" if not layer or is_one else f" ({layer})"
    return number(found.norm) + place + (" !" if any(record.is_outlier for record in group) else "")


def say_heat(page: Page, weights: Sequence[WeightRecord]) -> None:
    """A row of characters for each module kind, one a layer or block: the larger the figure, the denser the sign.

    An untrained weight, whose update is zero, has a sign of its own, and so has one whose figure is unknown; where
    there is no weight there is no sign.
    """
    figure = "|dW|/|W|" if any(record.relative_norm for record in weights) else "norm"
    columns = columns_of(weights)
    place = {label: at for at, label in enumerate(columns)}
    cells: dict[str, dict[int, float | None]] = {}
    for record in weights:
        value = record.norm if figure == "norm" else record.relative_norm
        column = place.get(column_of(record))
        if column is not None:
            row = cells.setdefault(record.module, {})
            row[column] = _larger(value if value is not None and math.isfinite(value) else None, row.get(column))
    if all(value is None for row in cells.values() for value in row.values()):
        page.say(Styled("  no heat map: no norms of weights in numbered layers", "dim"))
        return
    values = [value for row in cells.values() for value in row.values()]
    placed = [value for value in values if value]
    low, high = (min(placed), max(placed)) if placed else (0.0, 0.0)
    label = max(len(module) for module in cells)
    bins = _binned(range(len(columns)), None if page.width is None else max(8, page.width - label - 4))
    gaps = _gaps(bins, columns)
    if page.width is not None and len(bins) + sum(gaps) > page.width - label - 4:
        gaps = [0] * len(bins)
    word = "block" if any(record.block for record in weights) else "layer"
    page.say("")
    page.say("  ", Styled(f"{word:<{label}}", "dim"), "  ", Styled(_ruler(bins, columns, gaps), "dim"))
    for module, row in sorted(cells.items()):
        signs = (_sign(row, some, low, high) + " " * gap for some, gap in zip(bins, gaps, strict=True))
        page.say("  ", f"{module:<{label}}", "  ", "".join(signs))
    many = f"; {len(bins[0])} {word}s per character, showing the largest" if len(bins[0]) > 1 else ""
    ends = f"{number(low)} {RAMP} {number(high)}   " if placed else ""
    zero = f"{_ZERO} untrained   " if 0 in values else ""
    unknown = f"{_UNKNOWN} unknown   " if None in values else ""
    page.flow("  ", Styled(f"{ends}{zero}{unknown}({figure}, log scale{many})", "dim"))


def _larger(one: float | None, other: float | None) -> float | None:
    return max(known((one, other)), default=None)


def _binned(layers: Sequence[int], most: int | None) -> list[Sequence[int]]:
    size = 1 if most is None else math.ceil(len(layers) / most)
    return [layers[at : at + size] for at in range(0, len(layers), size)]


def _gaps(bins: Sequence[Sequence[int]], columns: Sequence[str]) -> list[int]:
    """How many blanks follow each column, so that the name of a kind of block fits above its columns."""
    kinds = [_kind_of(columns[bin_[0]]) for bin_ in bins]
    gaps, start = [0] * len(bins), 0
    for at in range(1, len(bins)):
        if kinds[at] != kinds[at - 1]:
            gaps[at - 1] = max(0, len(columns[bins[start][0]]) + 1 - (at - start))
            start = at
    return gaps


def _kind_of(label: str) -> str:
    return label.rstrip("0123456789 ")


def _ruler(bins: Sequence[Sequence[int]], columns: Sequence[str], gaps: Sequence[int]) -> str:
    """The number of every eighth layer above its column, or the name of the first of each kind of block."""
    text, last, place = "", "", 0
    for at, bin_ in enumerate(bins):
        label = columns[bin_[0]]
        kind = _kind_of(label)
        if (kind and kind != last) or (not kind and at % 8 == 0):
            text = text.ljust(place)[:place] + label
        last, place = kind, place + 1 + gaps[at]
    return text


def _sign(row: Mapping[int, float | None], layers: Sequence[int], low: float, high: float) -> str:
    here = [row[layer] for layer in layers if layer in row]
    largest = max(known(here), default=None)
    if not largest:
        return _ZERO if largest == 0 else _UNKNOWN if here else " "
    place = 1.0 if high <= low else math.log(largest / low) / math.log(high / low)
    return RAMP[round(place * (len(RAMP) - 1))]


def _numbers(group: _Group) -> list[int]:
    return sorted({layer for record in group if (layer := layer_of(record.weight)) is not None})


def _counts(ranks: Iterable[int | None]) -> dict[int, int]:
    return dict(sorted(Counter(rank for rank in ranks if rank is not None).items()))


def _median(values: Iterable[float | None]) -> str:
    return figure(middle(values))


def _most(values: Iterable[float | None]) -> str:
    return figure(max(known(values), default=None))
