"""Norms and inner products of updates, from Gram matrices of their factors; the product itself is never formed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING

from loraformat.algebra.factors import Matrix, Product, dense, is_sound, matrices_of, side_of
from loraformat.model.floats import quietly
from loraformat.model.updates import Kronecker, Update

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# Below this share of ‖left‖²·‖right‖² the sums of a squared norm cancel: 1e-8 leaves half the digits of float64.
_CANCELLED = 1e-8


@quietly
def frobenius(update: Update) -> float | None:
    """‖ΔW‖_F of an update, in float64; None where it has no meaning without the base, or no scale is known.

    For DoRA it is the norm of s·BA alone, before the magnitude is applied. `Replace` and `Rows` hold new values, not
    differences, so they have no norm here; what a `Scaled`, `Rotated` or `Multiplied` adds depends on the base.

    It is also None where factors do not fit each other, which the rules report.

    ‖s·BA‖_F² = s² · Σ (BᵀB ∘ AAᵀ), since ‖BA‖_F² = tr(AᵀBᵀBA).
    """
    if isinstance(update, Kronecker):
        if update.scale is None or not is_sound(update):
            return None
        return abs(update.scale) * norm_of(side_of(update.left)) * norm_of(side_of(update.right))
    return _hypot(norm_of(matrix) for matrix in matrices_of(update))


@quietly
def inner(one: Update, other: Update) -> float | None:
    """⟨ΔW₁, ΔW₂⟩, the sum of the elementwise products; None where either has no norm or the shapes differ.

    ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ).
    """
    terms = [inner_of(left, right) for left, right in _paired(one, other)]
    return math.fsum(terms) if terms else None


@quietly
def cosine(one: Update, other: Update) -> float | None:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), between -1 and 1; None as for `inner`, and where an update is zero."""
    product, norms = inner(one, other), (frobenius(one), frobenius(other))
    if product is None or not all(norms) or norms[0] is None or norms[1] is None:
        return None
    return max(-1.0, min(1.0, product / (norms[0] * norms[1])))


@quietly
def distance(one: Update, other: Update) -> float | None:
    """‖ΔW₁ - ΔW₂‖_F, from the factors of both side by side; None as for `inner`."""
    return _hypot(norm_of(_difference(left, right)) for left, right in _paired(one, other))


@quietly
def norm_of(matrix: Matrix) -> float:
    """‖matrix‖_F. Of a product by Gram matrices, or by QR of the factors where those would cancel."""
    if not isinstance(matrix, Product):
        return _length(matrix)
    left, right = matrix.left.T @ matrix.left, matrix.right @ matrix.right.T
    square, most = float((left * right).sum()), float(left.trace() * right.trace())
    return math.sqrt(square) if square > _CANCELLED * most else _norm_by_qr(matrix)


def core_of(product: Product) -> Floats:
    """R_left R_rightᵀ of the QR decompositions of both factors: a small matrix with the product's singular values."""
    import numpy as np

    left, right = (np.asarray(np.linalg.qr(each, mode="r"), np.float64) for each in (product.left, product.right.T))
    core: Floats = left @ right.T
    return core


def _norm_by_qr(matrix: Product) -> float:
    return _length(core_of(matrix))


def _length(values: Floats) -> float:
    """The root of the sum of all squares."""
    import numpy as np

    return float(np.linalg.norm(values))


def _paired(one: Update, other: Update) -> list[tuple[Matrix, Matrix]]:
    """Matrices of both, one by one; [] where they are not of the same shapes."""
    pairs: list[tuple[Matrix, Matrix]] = []
    for left, right in zip_longest(matrices_of(one), matrices_of(other)):
        if left is None or right is None or tuple(left.shape) != tuple(right.shape):
            return []
        pairs.append((left, right))
    return pairs


def inner_of(one: Matrix, other: Matrix) -> float:
    """The sum of the elementwise products of two matrices."""
    if not isinstance(one, Product):
        one, other = other, one
    if not isinstance(one, Product):
        return float((one * dense(other)).sum())
    if isinstance(other, Product):
        return float(((one.left.T @ other.left) * (one.right @ other.right.T)).sum())
    return float((one.left * (other @ one.right.T)).sum())


def _difference(one: Matrix, other: Matrix) -> Matrix:
    import numpy as np

    if isinstance(one, Product) and isinstance(other, Product):
        return Product(np.concatenate([one.left, -other.left], axis=1), np.concatenate([one.right, other.right]))
    return dense(one) - dense(other)


def _hypot(norms: Iterable[float]) -> float | None:
    found = list(norms)
    return math.hypot(*found) if found else None
