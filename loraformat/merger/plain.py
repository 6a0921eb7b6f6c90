"""Edits that only add products of two factors: told from headers, and computed without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.matching import WHOLE
from loraformat.merger.apply import stated_scale
from loraformat.merger.copies import Inputs
from loraformat.merger.multiply import not_finite
from loraformat.merger.plan import Edit, Term
from loraformat.model.floats import float64_of
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def is_plain(edit: Edit, inputs: Inputs) -> bool:
    """Whether all that an edit does is to add low-rank products to a floating tensor whose rows stand in order."""
    stored = inputs.base.tensors[edit.source]
    is_readable = stored.strides is None and stored.dtype.is_floating
    return is_readable and bool(edit.terms) and all(_is_product(term, inputs) for term in edit.terms)


def _is_product(term: Term, inputs: Inputs) -> bool:
    update = inputs.update(term)
    return isinstance(update, LowRank) and not update.is_stack and update.magnitude is None and term.part == WHOLE


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
    up, down = (_matrix(float64_of(factor), term.weight) for factor in (update.up, update.down))
    left, right = (down.T, up.T) if term.transposed else (up, down)
    return left * (stated_scale(update.scale, term.weight) * term.strength), right


def _matrix(factor: Floats, where: str) -> Floats:
    """A factor with its trailing axes flattened (a convolution's kernel)."""
    import numpy as np

    if not np.isfinite(factor).all():
        raise not_finite(where)
    return factor.reshape(factor.shape[0], math.prod(factor.shape[1:]))
