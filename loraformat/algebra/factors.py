"""Updates as products of two factors in float64, dense only where they have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Update, products_of, scale_of

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


@dataclass(frozen=True, slots=True)
class Product:
    """left @ right: (rows, rank) @ (rank, cols), both float64; a scale is in `left`."""

    left: Floats
    right: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.left.shape[0], self.right.shape[1]


# A Product, or a whole matrix (rows, cols) in float64 where factors would not be smaller.
Matrix: TypeAlias = Union[Product, "Floats"]


def is_additive(update: Update) -> bool:
    """Whether the kind adds a matrix that it has all of, so that it has a norm without the base."""
    return type(update) in MATRICES


def is_sound(update: Update) -> bool:
    """Whether the factors of an additive update fit each other and are not empty, so that it has a product at all."""
    if not all(_is_product(up, down) for up, down in products_of(update)):
        return False
    return update.is_even if isinstance(update, Hadamard) else True


def matrices_of(update: Update) -> Iterator[Matrix]:
    """The matrices of an additive update with its scale: one, or one for each expert of a stack.

    A convolution is (out, in · prod(kernel)), a vector one column. A dense update of three or more axes that is no
    convolution of a factor pair is flattened the same way.

    Nothing comes out for kinds that do not add, for an unknown scale, and for factors that do not fit.
    """
    scale = scale_of(update)
    if is_additive(update) and scale is not None and is_sound(update):
        yield from MATRICES[type(update)](update, scale)


def pairs_of(update: LowRank) -> Iterator[tuple[LazyTensor, LazyTensor]]:
    """The (up, down) of each expert of a stack; the one pair of any other update."""
    if not update.is_stack:
        yield update.up, update.down
        return
    for number in range(update.up.shape[0]):
        yield update.expert(number)


def side_of(factors: tuple[LazyTensor, ...]) -> Matrix:
    """One side of a Kronecker product."""
    if len(factors) == 1:
        return values_of(factors[0])
    return Product(values_of(factors[0]), values_of(factors[1]))


def dense(matrix: Matrix) -> Floats:
    """The whole matrix, (rows, cols) float64."""
    return matrix.left @ matrix.right if isinstance(matrix, Product) else matrix


def values_of(factor: LazyTensor) -> Floats:
    """All values as a float64 matrix, trailing axes flattened; a vector is one column."""
    value = float64_of(factor)
    rows = value.shape[0] if value.ndim else 1
    return value.reshape(rows, math.prod(value.shape[1:]))


def _hadamard(update: Hadamard, scale: float) -> Matrix:
    """(U1 D1) ∘ (U2 D2) is itself a product, of the row-wise Kronecker products of its factors."""
    up1, down1, up2, down2 = map(values_of, (update.up1, update.down1, update.up2, update.down2))
    if up1.shape[1] * up2.shape[1] >= min(up1.shape[0], down1.shape[1]):
        return (up1 @ down1) * (up2 @ down2) * scale
    left = (up1[:, :, None] * up2[:, None, :]).reshape(len(up1), -1) * scale
    return Product(left, (down1[:, None, :] * down2[None, :, :]).reshape(-1, down1.shape[1]))


def _low_rank(update: LowRank, scale: float) -> Iterator[Matrix]:
    for up, down in pairs_of(update):
        yield Product(values_of(up) * scale, values_of(down))


def _kronecker(update: Kronecker, scale: float) -> Iterator[Matrix]:
    import numpy as np

    left, right = (dense(side_of(factors)) for factors in (update.left, update.right))
    yield np.asarray(np.kron(left, right), np.float64) * scale


# The matrices of each kind whose `is_sum` holds, by its class.
MATRICES: Mapping[type[Update], Callable[[Any, float], Iterator[Matrix]]] = {
    LowRank: _low_rank,
    Hadamard: lambda update, scale: iter((_hadamard(update, scale),)),
    Kronecker: _kronecker,
    Dense: lambda update, scale: iter((values_of(update.delta) * scale,)),
}


def _is_product(up: LazyTensor, down: LazyTensor) -> bool:
    return len(up.shape) == 2 and len(down.shape) > 1 and up.shape[1] == down.shape[0] and bool(up.numel and down.numel)
