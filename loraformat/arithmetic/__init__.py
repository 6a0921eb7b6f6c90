"""Products and sums in one fixed order: the same bytes on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

__all__ = ["multiply"]


def multiply(left: Floats, right: Floats) -> Floats:
    """(…, rows, k) times (…, k, cols) in float64."""
    return left @ right
