"""Singular values of updates by QR of their factors, effective ranks, and overlaps of leading subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from loraformat.algebra.factors import Matrix, Product, is_sound, matrices_of, side_of
from loraformat.algebra.norms import core_of, frobenius, norm_of
from loraformat.model.floats import quietly
from loraformat.model.updates import Kronecker, Update

if TYPE_CHECKING:
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values

# Singular values below this share of the largest are noise of factors in float32: their vectors point anywhere.
_NOISE = 1e-6
_MOST_EXACT = 1024  # rows or columns, above which leading vectors of a matrix without factors are found by iteration


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values and what they say.

    Attributes:
        values: descending; of a stack of experts the root of the mean square of each place over the experts.
        spectral_norm: the largest; of a stack the largest of any expert.
        stable_rank: ‖ΔW‖_F² / σ₁² (Rudelson and Vershynin 2007); of a stack the median of the experts'.
        effective_rank: exp of the entropy of σ / Σσ (Roy and Vetterli 2007); of a stack the median.
    """

    values: tuple[float, ...]
    spectral_norm: float
    stable_rank: float
    effective_rank: float

    @property
    def energies(self) -> tuple[float, ...]:
        """The share of ‖ΔW‖_F² that the first k singular values hold, for k = 1, 2, …; empty for a zero update."""
        squares = [value * value for value in self.values]
        whole, held, shares = math.fsum(squares), 0.0, []
        if whole <= 0:
            return ()
        for square in squares:
            held += square
            shares.append(min(1.0, held / whole))
        return tuple(shares)

    def rank_holding(self, share: float) -> int:
        """The least rank that holds `share` of ‖ΔW‖_F²; 0 for a zero update."""
        return next((rank for rank, held in enumerate(self.energies, 1) if held >= share), len(self.energies))


@quietly
def spectrum(update: Update) -> Spectrum | None:
    """The spectrum of an additive update; None where `frobenius` is None, and where a value is not finite.

    Singular values of a product are those of R_left R_rightᵀ of its factors' QR decompositions; those of a Kronecker
    product are the products of its sides'. A matrix that has no smaller factors is decomposed whole.
    """
    return norm_and_spectrum(update)[1]


@quietly
def norm_and_spectrum(update: Update) -> tuple[float | None, Spectrum | None]:
    """`frobenius` and `spectrum` of an update, whose factors are read once."""
    if isinstance(update, Kronecker):
        return frobenius(update), _kronecker(update)
    norms: list[float] = []
    found: list[Spectrum | None] = []
    for matrix in matrices_of(update):
        norms.append(norm_of(matrix))
        found.append(spectrum_of(matrix))
    known = [each for each in found if each is not None]
    norm = math.hypot(*norms) if norms else None
    if not known or len(known) < len(found):
        return norm, None
    return norm, known[0] if len(known) == 1 else _folded(known)


@quietly
def spectrum_of(matrix: Matrix) -> Spectrum | None:
    """The spectrum of one matrix; None where a value is not finite."""
    values = singular_values(matrix)
    return None if values is None else _spectrum(values)


@quietly
def singular_values(matrix: Matrix) -> Floats | None:
    """Descending, float64, as many as the smallest axis of the matrix or of its factors; None where not finite."""
    whole = core_of(matrix) if isinstance(matrix, Product) else matrix
    return _singular_values(whole)[: min(matrix.shape)] if _is_finite(whole) else None


@quietly
def energy_ranks(
    matrix: Values, shares: Sequence[float], most: int = 256
) -> tuple[float | None, tuple[int | None, ...]]:
    """(effective rank, least rank that holds each share of ‖matrix‖²) of a whole matrix.

    A matrix of more than `most` rows and columns is projected on a random subspace of so many dimensions that power
    iteration has turned to its leading ones (Halko, Martinsson and Tropp 2011, algorithm 4.4): ranks are those of the
    projection, never below the truth, None where they are above `most`, and the effective rank is then None.
    """
    import numpy as np

    whole = float(np.square(matrix, dtype=np.float64).sum())
    if whole <= 0 or not math.isfinite(whole):
        return None, (None,) * len(shares)
    is_exact = min(matrix.shape) <= most
    values = _singular_values(matrix.astype(np.float64)) if is_exact else _leading_values(matrix, most)
    held = np.square(values).cumsum() / whole
    found = tuple(next((rank for rank, at in enumerate(held.tolist(), 1) if at >= share), None) for share in shares)
    return (_spectrum(values).effective_rank if is_exact else None), found


def _leading_values(matrix: Values, most: int) -> Floats:
    import numpy as np

    basis = _leading_basis(matrix, most, turns=2)
    return _singular_values((basis.T @ matrix).astype(np.float64))


def _leading_basis(matrix: Values, count: int, turns: int) -> Values:
    """(rows, count) orthonormal columns near the leading left singular vectors; the same for the same matrix."""
    import numpy as np

    drawn = np.random.default_rng(0).standard_normal((matrix.shape[1], count)).astype(matrix.dtype)
    basis = np.linalg.qr(matrix @ drawn).Q
    for _ in range(turns):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis).Q).Q
    return np.asarray(basis)


def _singular_values(matrix: Floats) -> Floats:
    import numpy as np

    return np.asarray(np.linalg.svd(matrix, compute_uv=False), np.float64)


def _is_finite(matrix: Floats) -> bool:
    import numpy as np

    return bool(np.isfinite(matrix).all())


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far the leading subspaces of two updates are the same: ‖U₁ᵀU₂‖_F² / k, between 0 and 1.

    Attributes:
        dimensions: k, at most the number of singular values of either update that are not noise.
        outputs: of left singular vectors.
        inputs: of right singular vectors.

    Source: Hu et al. 2021, LoRA, section 7.2, equation 4.
    """

    dimensions: int
    outputs: float
    inputs: float


@quietly
def overlap(one: Update, other: Update, dimensions: int = 8) -> Overlap | None:
    """The overlap of the leading subspaces of two updates; of stacks the mean over the experts.

    None where either is not an additive update of the same shape, is zero, or is not finite.
    """
    pairs = list(zip(matrices_of(one), matrices_of(other), strict=False))
    found = [_overlap(left, right, dimensions) for left, right in pairs if tuple(left.shape) == tuple(right.shape)]
    known = [each for each in found if each is not None]
    if not known or len(known) < len(pairs):
        return None
    count = len(known)
    return Overlap(
        dimensions=min(each.dimensions for each in known),
        outputs=math.fsum(each.outputs for each in known) / count,
        inputs=math.fsum(each.inputs for each in known) / count,
    )


def _overlap(one: Matrix, other: Matrix, dimensions: int) -> Overlap | None:
    first, second = (_leading(matrix, dimensions) for matrix in (one, other))
    if first is None or second is None:
        return None
    count = min(first[0].shape[1], second[0].shape[1])
    outputs, inputs = (
        min(1.0, float(((left[:, :count].T @ right[:, :count]) ** 2).sum()) / count)
        for left, right in zip(first, second, strict=True)
    )
    return Overlap(count, outputs, inputs)


def _leading(matrix: Matrix, dimensions: int) -> tuple[Floats, Floats] | None:
    """(left, right) singular vectors in columns, at most `dimensions` and none of the noise; None for none at all."""
    import numpy as np

    if isinstance(matrix, Product):
        (q_left, r_left), (q_right, r_right) = (np.linalg.qr(each) for each in (matrix.left, matrix.right.T))
        whole = r_left @ r_right.T
    else:
        q_left, q_right, whole = None, None, matrix
    if not _is_finite(whole):
        return None
    if min(whole.shape) > _MOST_EXACT:
        basis = _leading_basis(whole, dimensions + 16, turns=4)
        inner, values, transposed = np.linalg.svd(basis.T @ whole, full_matrices=False)
        left = basis @ inner
    else:
        left, values, transposed = np.linalg.svd(whole, full_matrices=False)
    right = transposed.T
    count = min(dimensions, int((values > _NOISE * values[0]).sum()))
    if not count:
        return None
    left, right = left[:, :count], right[:, :count]
    return (left if q_left is None else q_left @ left), (right if q_right is None else q_right @ right)


def _kronecker(update: Kronecker) -> Spectrum | None:
    import numpy as np

    if update.scale is None or not is_sound(update):
        return None
    left, right = (singular_values(side_of(factors)) for factors in (update.left, update.right))
    if left is None or right is None:
        return None
    return _spectrum(np.sort(np.outer(left, right).reshape(-1))[::-1] * abs(update.scale))


def _spectrum(values: Floats) -> Spectrum:
    found = values.tolist()
    largest = found[0] if found else 0.0
    if largest <= 0:
        return Spectrum(tuple(found), 0.0, 0.0, 0.0)
    total = math.fsum(found)
    entropy = -math.fsum(value / total * math.log(value / total) for value in found if value > 0)
    stable = math.fsum((value / largest) ** 2 for value in found)
    return Spectrum(tuple(found), largest, stable, math.exp(entropy))


def _folded(several: Sequence[Spectrum]) -> Spectrum:
    length = max(len(each.values) for each in several)
    places = range(length)
    squares = [[each.values[at] ** 2 for each in several if at < len(each.values)] for at in places]
    return Spectrum(
        values=tuple(math.sqrt(math.fsum(found) / len(several)) for found in squares),
        spectral_norm=max(each.spectral_norm for each in several),
        stable_rank=median(each.stable_rank for each in several),
        effective_rank=median(each.effective_rank for each in several),
    )
