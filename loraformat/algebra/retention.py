"""How much of an update may be lost to rounding before it is reported."""

from __future__ import annotations

# Of <W' - W, D> / <D, D>, for the exact update D and the rounded weight W'. LF406 and LF803 are about less.
LEAST_SHARE = 0.9


def is_lost(share: float | None) -> bool:
    """Whether less than LEAST_SHARE of an update survives; not where nothing is known of it."""
    return share is not None and share < LEAST_SHARE
