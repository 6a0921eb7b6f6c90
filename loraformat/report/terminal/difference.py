"""The page of `diff`: what was trained, then the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraformat.model.results.differences import UNKNOWN_SCALE, DiffResult, WeightDifference
from loraformat.model.summary import layer_of
from loraformat.report.lines import Page, Styled
from loraformat.report.weights import MOST_ROWS
from loraformat.report.words import amount, cut, figure, kind_name, known, middle, number, percent, plural, runs, shape

_MOST_FIELDS = 20
_LONGEST_VALUE = 60

_Group = Sequence[WeightDifference]
_Column = tuple[str, Callable[[_Group], str]]


def say_difference(page: Page, result: DiffResult) -> None:
    """What two adapters or checkpoints differ in."""
    page.flow(Styled(result.before, "bold"), "  against  ", Styled(result.after, "bold"), f"  ({result.subject_kind})")
    if len(set(result.formats)) > 1:
        page.fact("format", " -> ".join(result.formats))
    _say_fields(page, result)
    page.fact("weights", _counted(result.weights))
    for label, names in (("only in A", result.only_before), ("only in B", result.only_after)):
        if names:
            page.fact(label, f"{amount(len(names))}: {cut(list(names))}")
    if result.subject_kind == "checkpoints":
        _say_trained(page, result.weights)
    unknown = any(weight.reason == UNKNOWN_SCALE for weight in result.weights)
    if result.distance is not None and not unknown:
        cosine = "" if result.cosine is None else f", cosine {result.cosine:.4f}"
        page.fact("together", f"|B - A| {number(result.distance)}, {percent(result.relative)} of |A|{cosine}")
    _say_weights(page, result)
    values = Styled("incomparable", "bold yellow") if _is_open(result) else _verdict(result.has_equal_values)
    fields = "" if result.has_equal_metadata else f" ({plural(len(result.fields), 'field')})"
    page.say("values ", values, ", metadata ", _verdict(result.has_equal_metadata), fields)


def _is_open(result: DiffResult) -> bool:
    """Whether nothing is known to differ, but some scales are unknown."""
    apart = [weight for weight in result.weights if weight.status != "equal"]
    named_apart = result.only_before or result.only_after
    return bool(apart) and not named_apart and all(weight.reason == UNKNOWN_SCALE for weight in apart)


def _verdict(is_equal: bool) -> Styled:
    return Styled("equal", "bold green") if is_equal else Styled("different", "bold yellow")


def _say_fields(page: Page, result: DiffResult) -> None:
    for each in result.fields[:_MOST_FIELDS]:
        before, after = (_short(value) for value in (each.before, each.after))
        page.fact("config", f"{each.field}: {before} -> {after}")
    if len(result.fields) > _MOST_FIELDS:
        page.fact("config", f"and {amount(len(result.fields) - _MOST_FIELDS)} more fields")


def _short(value: str) -> str:
    if not value:
        return "absent"
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 3]}..."


def _counted(weights: _Group) -> str:
    counts = {status: sum(w.status == status for w in weights) for status in _STATUSES}
    told = [f"{amount(count)} {status}" for status, count in counts.items() if count]
    return f"{plural(len(weights), 'weight')} in both" + (f": {', '.join(told)}" if told else "")


_STATUSES = ("changed", "resized", "incomparable", "equal")


def _say_trained(page: Page, weights: _Group) -> None:
    """Which layers and modules hold all that changed: what was trained, and what was left alone."""
    for label, is_wanted in (("trained", True), ("untouched", False)):
        layers, others = set(), set()
        for weight in weights:
            layer = layer_of(weight.weight)
            if (weight.status != "equal") == is_wanted:
                if layer is None:
                    others.add(weight.weight)
                else:
                    layers.add(layer)
        if not is_wanted:
            layers -= {layer_of(weight.weight) for weight in weights if weight.status != "equal"}
        parts = [f"layer{'s' if len(layers) > 1 else ''} {runs(sorted(layers))}"] if layers else []
        page.fact(label, ", ".join([*parts, *([cut(sorted(others))] if others else [])]) or "nothing")


def _say_weights(page: Page, result: DiffResult) -> None:
    changed = [weight for weight in result.weights if weight.status != "equal"]
    grouping = result.grouping
    if grouping == "auto":
        grouping = "none" if len(changed) <= MOST_ROWS else "module"
    first, keys = _KEYS[grouping]
    groups: dict[tuple[str, ...], list[WeightDifference]] = {}
    for weight in changed:
        groups.setdefault(keys(weight), []).append(weight)
    columns = _columns(changed, grouping)
    head = [*first, *(name for name, _ in columns)]
    rows = [[*key, *(cell(group) for _, cell in columns)] for key, group in groups.items()]
    page.fitted_table(head, rows, _DISPENSABLE)
    for reason in sorted({weight.reason for weight in changed if weight.reason}):
        page.flow("  ", Styled("incomparable: ", "bold"), reason)


_DISPENSABLE = (
    *("kind", "shape", "largest", "most 90%", "rank 90%", "in", "cos min", "eff.rank", "experts", "most 99%"),
    *("rank 99%", "layer"),
)


def _layer_key(weight: WeightDifference) -> tuple[str, ...]:
    layer = layer_of(weight.weight)
    return ("none" if layer is None else str(layer),)


def _shapes(weight: WeightDifference) -> str:
    before, after = shape(weight.shape), shape(weight.shape_after)
    return before if before == after or not weight.shape_after else f"{before} -> {after}"


_KEYS: dict[str, tuple[list[str], Callable[[WeightDifference], tuple[str, ...]]]] = {
    "none": (["weight", "status", "shape"], lambda weight: (weight.weight, weight.status, _shapes(weight))),
    "module": (["module", "status", "shape"], lambda weight: (weight.module, weight.status, _shapes(weight))),
    "layer": (["layer"], _layer_key),
}


def _columns(weights: _Group, grouping: str) -> list[_Column]:
    columns: list[_Column] = []
    if grouping != "none":
        columns.append(("weights", lambda group: amount(len(group))))
    if any(weight.kind for weight in weights):
        columns.append(("kind", lambda group: ", ".join(sorted({kind_name(weight.kind) for weight in group}))))
    if any(weight.changed is not None for weight in weights):
        columns.append(("elements", lambda group: percent(middle(weight.changed for weight in group))))
    columns += [
        ("|B-A|/|A|", lambda group: percent(middle(weight.relative for weight in group))),
        ("|B|/|A|", lambda group: figure(middle(_norm_ratio(weight) for weight in group))),
        ("cos", lambda group: _cosine(middle(weight.cosine for weight in group))),
    ]
    if grouping != "none":
        columns.append(("cos min", lambda group: _cosine(min(known(weight.cosine for weight in group), default=None))))
    if grouping == "module":
        columns.append(("layer", _largest_layer))
    if any(weight.overlap_outputs is not None for weight in weights):
        columns += [
            ("overlap", lambda group: _share(middle(weight.overlap_outputs for weight in group))),
            ("in", lambda group: _share(middle(weight.overlap_inputs for weight in group))),
        ]
    if any(weight.rank_99 is not None or weight.effective_rank is not None for weight in weights):
        columns += [
            ("eff.rank", lambda group: figure(middle(weight.effective_rank for weight in group))),
            ("rank 90%", lambda group: figure(middle(weight.rank_90 for weight in group))),
            ("rank 99%", lambda group: figure(middle(weight.rank_99 for weight in group))),
        ]
    if any(weight.experts is not None for weight in weights):
        columns += [
            ("experts", lambda group: figure(middle(weight.experts for weight in group))),
            ("most 90%", lambda group: figure(max(known(weight.rank_90_most for weight in group), default=None))),
            ("most 99%", lambda group: figure(max(known(weight.rank_99_most for weight in group), default=None))),
        ]
    if any(weight.largest is not None for weight in weights):
        columns.append(("largest", lambda group: figure(max(known(w.largest for w in group), default=None))))
    return columns


def _largest_layer(group: _Group) -> str:
    """The layer that changes most."""
    found = max(group, key=lambda weight: weight.relative or 0.0)
    layer = layer_of(found.weight)
    return "-" if layer is None else str(layer)


def _norm_ratio(weight: WeightDifference) -> float | None:
    return weight.norm_after / weight.norm if weight.norm and weight.norm_after is not None else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
