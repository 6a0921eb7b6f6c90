"""The arithmetic of every kind of update, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loraformat.merger.compute.kinds.base_dependent import BASE_DEPENDENT
from loraformat.merger.compute.kinds.multiplicative import MULTIPLICATIVE
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Step
from loraformat.merger.compute.kinds.sums import SUMS
from loraformat.model.updates import Update, no_line

ARITHMETIC: Mapping[type[Update], Callable[[Any, Placement], Step]] = {**SUMS, **MULTIPLICATIVE, **BASE_DEPENDENT}


def prepare(update: Update, place: Placement) -> Step:
    """An update made ready for blocks of a stored tensor.

    Raises:
        NonFiniteValue (LF402): a factor holds NaN or infinity.
        MergeError (LF206): the scale is unknown.
        UnsupportedUpdate (LF013): its class has no arithmetic.
    """
    check_arithmetic([type(update)])
    return ARITHMETIC[type(update)](update, place)


def check_arithmetic(kinds: Iterable[type[Update]]) -> None:
    """Raises: UnsupportedUpdate (LF013): a class of update has no arithmetic."""
    for kind in kinds:
        if kind not in ARITHMETIC:
            raise no_line(kind, "ARITHMETIC in loraformat/merger/compute/kinds/arithmetic.py")
