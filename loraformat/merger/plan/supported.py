"""What a merge cannot do to an update: refused by name while it is planned."""

from __future__ import annotations

from loraformat.errors import UnsupportedUpdate
from loraformat.matching import WHOLE, Landing
from loraformat.model.summary import kind_of
from loraformat.model.updates.kinds import Diff, Hadamard, Kronecker, LowRank, Update

_NAMES = {"replace": "a full weight", "rows": "a set of trained rows", "dora": "a DoRA update"}


def check_strength(weight: str, update: Update, strength: float) -> None:
    """Refuse a strength other than 1 where an update is no sum.

    Raises: UnsupportedUpdate (LF013).
    """
    if strength == 1.0 or isinstance(update, (Diff, Hadamard, Kronecker)):
        return
    if not isinstance(update, LowRank) or update.magnitude is not None:
        raise UnsupportedUpdate(
            f"{weight}: {_NAMES.get(kind_of(update), kind_of(update))} cannot be merged at a strength of {strength:g}",
            where="merge",
            hint="it is no sum that could be weakened; merge its adapter without a strength",
        )


def check_part(weight: str, update: Update, landing: Landing) -> None:
    """Refuse an update that cannot be cut into the parts in which the base stores its weight.

    Raises: UnsupportedUpdate (LF013).
    """
    if landing.part == WHOLE:
        return
    if isinstance(update, Diff) or (isinstance(update, LowRank) and update.magnitude is None):
        return
    if isinstance(update, LowRank) and _has_row_norms(update, transposed=landing.transposed):
        return
    raise UnsupportedUpdate(
        f"{weight}: the base stores it in parts, first {landing.tensor}, into which an update of the kind "
        f"{kind_of(update)} cannot be cut",
        where="merge",
    )


def _has_row_norms(update: LowRank, *, transposed: bool) -> bool:
    """Whether DoRA's norms are those of single stored rows, so that a part of the rows is enough for them."""
    return update.magnitude is not None and (update.magnitude.axis == 1) != transposed
