"""Weights selected by patterns on the command line: by module path, its last components, or layer number."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from loraformat.diagnostics import did_you_mean, show
from loraformat.errors import UsageError
from loraformat.model.adapter import module_of
from loraformat.model.patterns.keys import ends_of
from loraformat.model.summary import layer_of

_LAYERS = re.compile(r"layers=(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)", re.ASCII)


def chosen_of(weights: Sequence[str], select: Sequence[str], drop: Sequence[str], owner: str) -> tuple[str, ...]:
    """The weights that `select` means, all where it is empty, without those that `drop` means; in their order.

    Args:
        owner: what they are the weights of, for messages.

    Raises: UsageError (LF021): a pattern matches none.
    """
    chosen = tuple(weights)
    for option, patterns in (("--select", select), ("--drop", drop)):
        if patterns:
            hit = set().union(*(hits_of(pattern, weights, option, owner) for pattern in patterns))
            chosen = tuple(weight for weight in chosen if (weight in hit) == (option == "--select"))
    return chosen


def hits_of(pattern: str, weights: Sequence[str], option: str, owner: str) -> set[str]:
    """The weights that a pattern means. Raises: UsageError (LF021): there is none."""
    found = matching(pattern, weights)
    if not found:
        ends = {module_of(weight).rpartition(".")[2] for weight in weights}
        text = f"no weight of {owner} matches {show(pattern, 200)}"
        raise UsageError(text, where=option, hint=did_you_mean(pattern, ends).strip())
    return found


def matching(pattern: str, weights: Sequence[str]) -> set[str]:
    """The weights that a pattern means; see `pick`.

    >>> sorted(matching("q_proj", ["layers.0.q_proj.weight", "layers.0.k_proj.weight"]))
    ['layers.0.q_proj.weight']
    """
    layers = _LAYERS.fullmatch(pattern)
    if layers:
        runs = [
            (int(first), int(last or first)) for first, _, last in (run.partition("-") for run in layers[1].split(","))
        ]
        return {
            weight
            for weight in weights
            if (layer := layer_of(weight)) is not None and any(first <= layer <= last for first, last in runs)
        }
    matches = re.compile(fnmatch.translate(pattern)).match
    return {
        weight
        for weight in weights
        if matches(weight) or any(matches(end) for end in (module_of(weight), *ends_of(module_of(weight))))
    }
