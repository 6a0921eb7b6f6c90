"""Edits that only add products of two factors: told from headers, and computed in one pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.merger.compute.kinds.steps import not_finite, stated_scale
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit, Term
from loraformat.model.floats import float64_of
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def is_plain(edit: Edit, inputs: Inputs) -> bool:
    """Whether all that an edit does is to add low-rank products."""
    return bool(edit.terms) and all(_is_product(term, edit, inputs) for term in edit.terms)


def _is_product(term: Term, edit: Edit, inputs: Inputs) -> bool:
    """Whether a term is a low-rank product for all rows of a tensor."""
    update, part = inputs.update(term), term.part
    if not isinstance(update, LowRank) or update.magnitude is not None or update.is_stack != (part.expert is not None):
        return False
    return part.at == 0 and (part.rows is None or part.rows[1] - part.rows[0] == edit.matrix[0])


def factors_of(edit: Edit, inputs: Inputs) -> tuple[Floats, Floats]:
    """(left, right) of a plain edit: left @ right is what its terms add together, as stored.

    Returns: (rows, rank) and (rank, cols), rank the sum of all ranks; scale and strength are in `left`.

    Raises:
        NonFiniteValue (LF402): a factor holds NaN or infinity.
        MergeError (LF206): the scale is unknown.
    """
    import numpy as np

    pairs = [_oriented(term, inputs) for term in edit.terms]
    return np.concatenate([left for left, _ in pairs], axis=1), np.concatenate([right for _, right in pairs])


def _oriented(term: Term, inputs: Inputs) -> tuple[Floats, Floats]:
    update = inputs.update(term)
    assert isinstance(update, LowRank)
    factors = (update.up, update.down) if term.part.expert is None else update.expert(term.part.expert)
    up, down = (_matrix(float64_of(factor), term.weight) for factor in factors)
    left, right = (down.T, up.T) if term.transposed else (up, down)
    left = left if term.part.rows is None else left[slice(*term.part.rows)]
    return left * (stated_scale(update.scale, term.weight) * term.strength), right


def _matrix(factor: Floats, where: str) -> Floats:
    """A factor with its trailing axes flattened (a convolution's kernel)."""
    import numpy as np

    if not np.isfinite(factor).all():
        raise not_finite(where)
    return factor.reshape(factor.shape[0], math.prod(factor.shape[1:]))
