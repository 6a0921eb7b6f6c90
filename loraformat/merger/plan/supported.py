"""Updates that cannot be merged, refused while the merge is planned."""

from __future__ import annotations

from loraformat.errors import UnsupportedUpdate
from loraformat.matching import WHOLE, Landing
from loraformat.model.updates import Update, kind_of


def check_strength(weight: str, update: Update, strength: float) -> None:
    """Refuse a strength other than 1 where an update is not a sum.

    Raises: UnsupportedUpdate (LF013).
    """
    kind = kind_of(update)
    if strength != 1.0 and not kind.has_strength:
        raise UnsupportedUpdate(
            f"{weight}: {kind.noun} cannot be merged at a strength of {strength:g}",
            where="merge",
            hint="it is not an addition that can be scaled; merge its adapter without a strength",
        )


def check_part(weight: str, update: Update, landing: Landing) -> None:
    """Refuse an update that cannot be cut into the parts in which the base stores its weight.

    Raises: UnsupportedUpdate (LF013).
    """
    kind = kind_of(update)
    if landing.part == WHOLE or kind.by_rows(update, landing.transposed):
        return
    raise UnsupportedUpdate(
        f"{weight}: the base stores it in parts, first {landing.tensor}, and an update of the kind {kind.name} "
        "cannot be split",
        where="merge",
    )
