"""Methods that combine the changes of one weight by several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraformat.algebra.decomposition import Decomposition, decomposed, stored
from loraformat.algebra.elementwise import Combined, Sparsity, combined
from loraformat.algebra.factors import Matrix, Product
from loraformat.algebra.norms import norm_of
from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import held, leading
from loraformat.algebra.shared_bases import core, knots
from loraformat.errors import UnsupportedUpdate
from loraformat.jobs.algebra.factoring import Form, tensor_of
from loraformat.jobs.algebra.sources import added, multiplied
from loraformat.model.results.factor_changes import FactorChange
from loraformat.model.tensors import DType
from loraformat.model.updates import LowRank

# Below this share of Σ ‖w·ΔW‖ a sum of float64 products is what rounding left of nothing.
_CANCELLED = 1e-13

SHARED = {"knots-ties": knots, "core-ties": core}


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one adapter does to a weight.

    Attributes:
        number: of the adapter.
        weight: by which it counts.
        matrices: one, or one for each expert, without `scale`.
        scale: the adapter's own.
        rank: as stored.
    """

    number: int
    weight: float
    matrices: tuple[Matrix, ...]
    scale: float
    rank: int

    def change(self, expert: int) -> Matrix:
        """ΔW of one expert."""
        return multiplied(self.matrices[expert], self.scale)

    def weighted(self, expert: int) -> Matrix:
        """ΔW of one expert times the weight of its adapter."""
        return multiplied(self.matrices[expert], self.weight * self.scale)


@dataclass(frozen=True, slots=True)
class Mixed:
    """The combination of one weight, before its rank is chosen.

    Attributes:
        found: one decomposition, or one for each expert.
        conflicts: share of the places with opposite signs; None where values are not combined one by one.
    """

    found: tuple[Decomposition, ...]
    conflicts: float | None = None


def sum_of(terms: Sequence[Contribution], expert: int) -> Matrix:
    """Σ w · ΔW of one expert; factors of zeros, of rank 0, where the terms cancel."""
    import numpy as np

    total = added([term.weighted(expert) for term in terms])
    parts = math.fsum(abs(term.weight * term.scale) * norm_of(term.matrices[expert]) for term in terms)
    if norm_of(total) > _CANCELLED * parts:
        return total
    return Product(np.zeros((total.shape[0], 0)), np.zeros((0, total.shape[1])))


def mixed(terms: Sequence[Contribution], method: str, sparsity: Sparsity, rule: RankRule, name: str) -> Mixed:
    """The combination by a method, decomposed as far as a rule needs it."""
    experts = range(len(terms[0].matrices))
    if method in ("cat", "svd"):
        return Mixed(tuple(decomposed(sum_of(terms, expert), rule.most) for expert in experts))
    found: list[Decomposition] = []
    tallies: list[Combined] = []
    weights = [term.weight for term in terms]
    for expert in experts:
        label = name if len(experts) == 1 else f"{name}:{expert}"
        matrices = [term.change(expert) for term in terms]
        if method in SHARED:
            small, source = SHARED[method]([_product(each) for each in matrices], weights, sparsity, label)
            found.append(decomposed(small))
        else:
            source = combined(matrices, weights, sparsity, label)
            found.append(leading(source, rule))
        tallies.append(source)
    there, opposed = (sum(getattr(each.tally, name) for each in tallies) for name in ("there", "opposed"))
    return Mixed(tuple(found), opposed / there if there else 0.0)


def _product(matrix: Matrix) -> Product:
    """Factors of any matrix."""
    if isinstance(matrix, Product):
        return matrix
    found = decomposed(matrix)
    return found.factors(found.rank)


def concatenated(
    weight: str, terms: Sequence[Contribution], form: Form, dtype: DType, *, keeps_scale: bool
) -> tuple[LowRank | None, FactorChange]:
    """Σ w · ΔW as one pair of factors, side by side: exact but for the rounding of w · scale · B to the dtype.

    Where all terms have one w · scale that is the scale of the result, and no factor changes. Where the ranks add up to
    more than the smaller axis, a decomposition brings them down to it without a loss; None where the terms cancel.

    Args:
        keeps_scale: whether the scale may be other than 1, which that of a bias beside the factors is.
    """
    import numpy as np

    before = sum(term.rank for term in terms)
    sums = [sum_of(terms, expert) for expert in range(len(terms[0].matrices))]
    norm = math.hypot(*(norm_of(each) for each in sums))
    if not norm:
        return None, FactorChange(weight=weight, rank_before=before, rank=0, norm=0.0)
    pairs = [_product(each) for each in sums]
    scales = {term.weight * term.scale for term in terms}
    scale = scales.pop() if keeps_scale and len(scales) == 1 and isinstance(sums[0], Product) else 1.0
    if scale != 1.0:
        pairs = [_product(added([term.matrices[expert] for term in terms])) for expert in range(len(sums))]
    most = max(min(pair.shape) for pair in pairs)
    if pairs[0].left.shape[1] > most:
        found = [decomposed(each) for each in sums]
        rank, scale = max(each.rank for each in found), 1.0
        pairs = [_padded(each.factors(rank), rank) for each in found]
    lefts, rights, costs = [], [], []
    for pair in pairs:
        written, change = stored(pair, dtype)
        lefts.append(written.left)
        rights.append(written.right)
        costs.append(abs(scale) * change)
    up, down = (np.stack(each) if form.is_stack else each[0] for each in (lefts, rights))
    update = LowRank(tensor_of(up, dtype), tensor_of(down, dtype), scale, None, form.kernel, form.is_embedding)
    error = math.hypot(*costs) / norm
    return update, FactorChange(
        weight=weight, rank_before=before, rank=update.rank, norm=norm, error=error, optimum=0.0, energy=1.0
    )


def _padded(pair: Product, rank: int) -> Product:
    import numpy as np

    missing = rank - pair.left.shape[1]
    return Product(np.pad(pair.left, ((0, 0), (0, missing))), np.pad(pair.right, ((0, missing), (0, 0))))


def like_peft(
    weight: str, terms: Sequence[Contribution], sparsity: Sparsity, form: Form, dtype: DType
) -> tuple[LowRank, FactorChange]:
    """PEFT's combinations of factors: A and B are each combined by themselves, which is not the sum of the updates.

    Raises: UnsupportedUpdate (LF013): the ranks differ, or an update is not one pair of factors.

    Source: peft 0.21.2, tuners/lora/model.py `_generalized_task_arithmetic_weighted_adapter`.
    """
    pairs = [term.matrices[0] for term in terms if isinstance(term.matrices[0], Product)]
    if len({pair.left.shape[1] for pair in pairs}) != 1 or len(pairs) < len(terms) or form.is_stack:
        raise UnsupportedUpdate(
            "factors of different ranks, or stacks of experts, cannot be added",
            where=weight,
            hint="leave --like-peft out and use cat or svd",
        )
    products = [term.weight * term.scale for term in terms]
    roots = [math.sqrt(abs(each)) for each in products]
    signed = [math.copysign(root, each) for root, each in zip(roots, products, strict=True)]
    # PEFT's sign goes to A, which of an embedding is the side of the table.
    if form.is_embedding:
        roots, signed = signed, roots
    up = held(combined([pair.left for pair in pairs], roots, sparsity, f"{weight}:B")).values
    down = held(combined([pair.right for pair in pairs], signed, sparsity, f"{weight}:A")).values
    written, _ = stored(Product(up, down), dtype)
    exact = added([term.weighted(0) for term in terms])
    norm = norm_of(exact)
    off = norm_of(added([exact, multiplied(written, -1.0)]))
    change = FactorChange(
        weight=weight,
        rank_before=sum(term.rank for term in terms),
        rank=up.shape[1],
        norm=norm,
        error=off / norm if norm else 0.0,
        cross_terms=off / norm if norm else 0.0,
    )
    return LowRank(tensor_of(up, dtype), tensor_of(down, dtype), 1.0, None, form.kernel, form.is_embedding), change
