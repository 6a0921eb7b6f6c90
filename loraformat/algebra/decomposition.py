"""Singular value decompositions of updates, and the best factors of a lower rank.

Of a product only the factors are decomposed: B = Q_b R_b, Aᵀ = Q_a R_a and R_b R_aᵀ = U Σ Vᵀ give BA = (Q_b U) Σ
(Q_a V)ᵀ, in a time that grows with the rows and columns and not with their product. QR and SVD are numpy's, in float64,
each over a whole matrix: the last bits are those of its LAPACK on one thread, which the command line asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.algebra.factors import Matrix, Product
from loraformat.algebra.norms import norm_of
from loraformat.model.tensors import DType, rounded

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_EPSILON = 2.0**-52


@dataclass(frozen=True, slots=True)
class Decomposition:
    """left · diag(values) · right, and what it leaves out of the matrix that it is of.

    >>> import numpy as np
    >>> found = decomposed(Product(np.array([[3.0, 0.0], [0.0, 4.0]]), np.eye(2)))
    >>> found.values, found.tail(1), found.norm
    (array([4., 3.]), 3.0, 5.0)

    Attributes:
        left: (rows, count), orthonormal columns; fewer where no more were wanted, as in `right`.
        values: (count,), the singular values, descending, none of them zero.
        right: (count, cols), orthonormal rows.
        residual: the Frobenius norm of what it leaves out; 0 where it is complete.
    """

    left: Floats
    values: Floats
    right: Floats
    residual: float = 0.0

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the whole matrix."""
        return self.tail(0)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.left.shape[0], self.right.shape[1]

    def tail(self, rank: int) -> float:
        """The Frobenius norm of what the first `rank` singular values leave out: the least error of that rank.

        Eckart and Young 1936, where nothing but these values is in the matrix.
        """
        scale = float(self.values[0]) if self.rank else 0.0
        if not scale:
            return self.residual
        square = math.fsum((value / scale) ** 2 for value in self.values[rank:].tolist())
        return math.hypot(scale * math.sqrt(square), self.residual)

    def factors(self, rank: int) -> Product:
        """The best approximation of a rank: (rows, rank) @ (rank, cols), √σ in both factors.

        The entry of the largest magnitude in each column of the left factor is positive, so that a decomposition, which
        leaves the signs free, gives the same factors again.
        """
        import numpy as np

        left, right = self.left[:, :rank], self.right[:rank]
        at = np.argmax(np.abs(left), axis=0)
        roots = np.sqrt(self.values[:rank])
        signs = np.where(left[at, np.arange(left.shape[1])] < 0, -1.0, 1.0)
        return Product(left * (signs * roots), right * (signs * roots)[:, None])


def decomposed(matrix: Matrix, vectors: int | None = None) -> Decomposition:
    """The singular value decomposition of a product or of a whole matrix, complete.

    Singular values that the factors cannot tell from zero, below σ₁ · max(rows, cols) · 2⁻⁵², are left out with their
    vectors. All values must be finite.

    Args:
        vectors: how many vectors of either side are wanted, where that is less than all; the values are all there.
    """
    import numpy as np

    if isinstance(matrix, Product):
        # The orthonormal columns of factors whose columns are many more than rows are not more than the rows.
        q_left, r_left = np.linalg.qr(matrix.left)
        q_right, r_right = np.linalg.qr(matrix.right.T)
        left, values, right = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    else:
        q_left, q_right = None, None
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    least = values[0] * max(matrix.shape) * _EPSILON if len(values) else 0.0
    count = int((values > least).sum())
    wanted = count if vectors is None else min(count, vectors)
    left, right = left[:, :wanted], right[:wanted]
    return Decomposition(
        left if q_left is None else q_left @ left, values[:count], right if q_right is None else right @ q_right.T
    )


def stored(factors: Product, dtype: DType) -> tuple[Product, float]:
    """(the factors rounded to a dtype, the Frobenius norm of what that changes in their product).

    The change (B + E)(A + F) − BA = BF + E(A + F) is taken of the differences themselves, so nothing cancels.
    """
    import numpy as np

    left, right = (rounded(each, dtype).astype(np.float64) for each in (factors.left, factors.right))
    change = Product(
        np.concatenate([factors.left, left - factors.left], axis=1),
        np.concatenate([right - factors.right, right]),
    )
    return Product(left, right), norm_of(change)
