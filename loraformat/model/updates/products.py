"""Products of more than one pair of factors: LoHa and LoKr."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import is_product, is_shape, size


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: ΔW = scale · (up1 @ down1) ∘ (up2 @ down2).

    Attributes: up1, up2: (rows, rank); down1, down2: (rank, cols).
    Source: peft 0.21.2, tuners/loha/layer.py.
    """

    up1: LazyTensor
    down1: LazyTensor
    up2: LazyTensor
    down2: LazyTensor
    scale: float | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols); meaningful when the factors fit."""
        return (size(self.up1, 0), size(self.down1, 1))

    @property
    def is_even(self) -> bool:
        """Whether both are products, and of the same shape."""
        are_products = all(is_product((up, down)) for up, down in ((self.up1, self.down1), (self.up2, self.down2)))
        return are_products and self.shape == (size(self.up2, 0), size(self.down2, 1))

    @property
    def rank(self) -> int:
        """The rank of either product."""
        return size(self.down1, 0)

    @property
    def products(self) -> tuple[tuple[LazyTensor, LazyTensor], ...]:
        """The (up, down) that must fit as matrices."""
        return ((self.up1, self.down1), (self.up2, self.down2))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of `shape`; a convolution as (out, in · prod(kernel))."""
        return self.is_even and is_shape(self.shape, (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: ΔW = scale · kron(left, right), each either one matrix or the product of two.

    Attributes:
        left: one matrix (a, b), or two: (a, rank), (rank, b).
        right: one matrix (c, d), or two: (c, rank), (rank, d). The update is (a·c, b·d).
    Source: peft 0.21.2, tuners/lokr/layer.py.
    """

    left: tuple[LazyTensor, ...]
    right: tuple[LazyTensor, ...]
    scale: float | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(a·c, b·d); meaningful when the factors fit."""
        (a, b), (c, d) = ((size(factors[0], 0), size(factors[-1], 1)) for factors in (self.left, self.right))
        return (a * c, b * d)

    @property
    def is_even(self) -> bool:
        """Whether factors that are two matrices are products."""
        return is_product(self.left) and is_product(self.right)

    @property
    def products(self) -> tuple[tuple[LazyTensor, LazyTensor], ...]:
        """The two matrices of each side that has two, which must fit."""
        return tuple((side[0], side[1]) for side in (self.left, self.right) if len(side) == 2)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of `shape`; a convolution as (out, in · prod(kernel))."""
        return self.is_even and is_shape(self.shape, (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape)
