"""Several changes of one weight in a shared basis: KnOTS and Core Space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraformat.algebra.elementwise import Combined, Sparsity, combined
from loraformat.algebra.factors import Product
from loraformat.algebra.row_blocks import held

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def knots(
    terms: Sequence[Product], weights: Sequence[float], sparsity: Sparsity, name: str
) -> tuple[Product, Combined]:
    """The changes side by side, [Δ₁ … Δₙ] = U Σ [V₁ … Vₙ]; the ΣVᵢ are combined value by value and multiplied by U.

    The rank of the result is at most the sum of all ranks, and no matrix of the size of the weight is formed.

    Source: KnOTS (Stoica et al. 2024, arXiv 2410.19735).
    """
    basis = _basis(terms)
    parts = [(basis.T @ term.left) @ term.right for term in terms]
    found = combined(parts, weights, sparsity, name)
    return Product(basis, held(found).values), found


def core(terms: Sequence[Product], weights: Sequence[float], sparsity: Sparsity, name: str) -> tuple[Product, Combined]:
    """Δᵢ = U Mᵢ Vᵀ with bases U and V of all changes; the small Mᵢ are combined value by value.

    U and V are the singular vectors of the changes side by side and one above the other, so the result does not depend
    on how a change is split into factors. Those of the paper are of the stacked factors; they span the same spaces.

    Source: core space merging (arXiv 2509.17786).
    """
    left = _basis(terms)
    right = _basis([Product(term.right.T, term.left.T) for term in terms])
    parts = [(left.T @ term.left) @ (term.right @ right) for term in terms]
    found = combined(parts, weights, sparsity, name)
    return Product(left @ held(found).values, right.T), found


def _basis(terms: Sequence[Product]) -> Floats:
    """The left singular vectors of the terms side by side, (rows, at most the sum of all ranks)."""
    import numpy as np

    columns, mixes = np.linalg.qr(np.concatenate([term.left for term in terms], axis=1))
    wide, start = [], 0
    for term in terms:
        stop = start + term.left.shape[1]
        wide.append(mixes[:, start:stop] @ term.right)
        start = stop
    # The right vectors are not needed: Rᵀ of a QR decomposition of the transpose has the same left ones.
    triangle = np.asarray(np.linalg.qr(np.concatenate(wide, axis=1).T, mode="r"), np.float64)
    found: Floats = columns @ np.linalg.svd(triangle.T, full_matrices=False)[0]
    return found
