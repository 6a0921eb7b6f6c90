"""How an adapter was made, as the verb that wrote it reported; and the components of an image or video model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraformat.diagnostics import show
from loraformat.model.results.factor_changes import NOISE_MARGIN, FactorResult
from loraformat.model.results.plot_data import ComponentRecord
from loraformat.report.words import amount, histogram, nbytes, number, percent, plural, rank_change

_MOST_ADAPTERS = 20  # that are listed and whose cosines are drawn
_MOST_NAMES = 20


@dataclass(frozen=True, slots=True)
class Made:
    """What the page says of it.

    Attributes:
        facts: (what, text) in the order of reading.
        cosines: a row for each adapter: its number and name, then its cosine with each of them; [] for none.
    """

    facts: Sequence[tuple[str, str]]
    cosines: Sequence[Sequence[str]]


def made_of(verb: str, made: FactorResult | None) -> Made | None:
    """None where nothing was reported."""
    return None if made is None else Made(tuple(_facts(verb, made)), _cosines(made))


def component_rows(components: Sequence[ComponentRecord]) -> list[list[str]]:
    """Cells of the table of components; with ‖ΔW‖/‖W‖ where it is known."""
    has_base = any(each.relative_norm is not None for each in components)
    return [
        [
            show(each.component),
            amount(each.weights),
            histogram(each.ranks),
            amount(each.parameters),
            number(each.norm),
            *([percent(each.relative_norm)] if has_base else ()),
        ]
        for each in components
    ]


def _facts(verb: str, made: FactorResult) -> Iterator[tuple[str, str]]:
    yield show(verb), show(made.method)
    for uri, weight in made.adapters[:_MOST_ADAPTERS]:
        yield "adapter", show(uri) + ("" if weight == 1 else f", weight {weight:g}")
    if len(made.adapters) > _MOST_ADAPTERS:
        yield "adapters", f"{amount(len(made.adapters) - _MOST_ADAPTERS)} more"
    for role, uri in zip(("base", "tuned"), made.models, strict=False):
        yield role, show(uri)
    yield "ranks", rank_change(made.weights)
    yield from _errors(made)
    if made.kept:
        yield "carried over", _names(made.kept)
    if made.left_out:
        yield "left out", f"{percent(made.dropped)} of Σ‖ΔW‖²: {_names(made.left_out)}"
    if made.bytes_before:
        yield "size", f"files of {nbytes(made.bytes_written)}, made from tensors of {nbytes(made.bytes_before)}"


def _errors(made: FactorResult) -> Iterator[tuple[str, str]]:
    least = "" if made.optimum is None else f"; the least possible at these ranks is {number(made.optimum)}"
    yield "error", f"{number(made.error)} of ‖ΔW‖{least}" if math.isfinite(made.error) else "not a finite number"
    if made.energy is not None:
        yield "energy", f"{percent(made.energy)} of ‖ΔW‖² fits these ranks"
    if made.conflicts is not None:
        yield "opposite signs", f"at {percent(made.conflicts)} of the entries"
    if made.cross_terms is not None:
        yield "cross terms", f"the output is {percent(made.cross_terms)} off Σ w·ΔW"
    if made.floor is not None:
        is_noise = made.error <= made.floor * NOISE_MARGIN
        advice = "; the error is about as large, so a larger rank would only store rounding" if is_noise else ""
        yield "noise", f"{number(made.floor)} of ‖ΔW‖ is rounding of the tuned model{advice}"
    if made.retained is not None:
        yield "merging back", f"into the base keeps {percent(made.retained)} of the update"


def _names(names: Sequence[str]) -> str:
    more = f", and {amount(len(names) - _MOST_NAMES)} more" if len(names) > _MOST_NAMES else ""
    return f"{plural(len(names), 'weight')}: {', '.join(show(name) for name in names[:_MOST_NAMES])}{more}"


def _cosines(made: FactorResult) -> list[list[str]]:
    count = min(len(made.adapters), _MOST_ADAPTERS)
    found = {(first, second): cosine for first, second, cosine in made.cosines}
    if not found:
        return []

    def cell(one: int, other: int) -> str:
        cosine = 1.0 if one == other else found.get((min(one, other), max(one, other)))
        return "–" if cosine is None else f"{cosine:+.4f}"

    return [
        [f"{one + 1} {show(made.adapters[one][0])}", *(cell(one, other) for other in range(count))]
        for one in range(count)
    ]
