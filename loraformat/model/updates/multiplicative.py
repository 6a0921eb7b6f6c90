"""Updates that multiply the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import size


@dataclass(frozen=True, slots=True)
class Scaled:
    """W' = rows ⊙ W ⊙ cols: each output, each input or both have their own factor.

    Attributes:
        rows: (out,): factors of the first axis, or None.
        cols: (in,): factors of the second axis, for a convolution over all positions of the kernel, or None.
        is_bias: the weight is the bias vector of an adapted layer, which a base may lack; `cols` is None then.
        is_sum: what it changes in the base's own values is added; else it scales what stands there after other updates.
    Source: peft 0.21.2, tuners/ia3/layer.py; tuners/glora/layer.py.
    """

    rows: LazyTensor | None
    cols: LazyTensor | None = None
    is_bias: bool = False
    is_sum: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out,) for a bias; 0 for an axis that only the base tells."""
        out, into = (0 if vector is None else vector.numel for vector in (self.rows, self.cols))
        return (out,) if self.is_bias else (out, into)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be scaled so."""
        vectors = (self.rows, self.cols)
        return all(vector is None or shape[axis : axis + 1] == (vector.numel,) for axis, vector in enumerate(vectors))


@dataclass(frozen=True, slots=True)
class Rotated:
    """W' = L W or W R, where L or R is block-diagonal; a convolution is flattened to (out, in · prod(kernel)).

    Attributes:
        blocks: (count, size, size): the blocks along the diagonal, as they multiply.
        side: "left" for L, which mixes outputs, "right" for R, which mixes inputs.
        is_shared: whether the one block stands along the whole diagonal, as often as it fits.
        order: in which order rows (left) or columns (right) are taken for the blocks, or None for their own. They are
            put back afterwards: BOFT's butterfly permutations.
        is_bias: see Scaled; side is "left" then.
    Source: peft 0.21.2, tuners/oft/layer.py, tuners/boft/layer.py, tuners/road/layer.py.
    """

    blocks: LazyTensor
    side: Literal["left", "right"]
    is_shared: bool = False
    order: tuple[int, ...] | None = None
    is_bias: bool = False

    @property
    def size(self) -> int:
        """Rows of a block."""
        return size(self.blocks, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out,) for a bias; 0 for an axis that only the base tells."""
        length = 0 if self.is_shared else size(self.blocks, 0) * self.size
        if self.is_bias:
            return (length,)
        return (length, 0) if self.side == "left" else (0, length)

    def row_unit(self, transposed: bool, rows: int) -> int:
        """How many rows of the stored tensor, out of `rows`, it mixes."""
        if (self.side == "left") == transposed:
            return 1
        return self.size if self.order is None else rows

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be rotated so."""
        length = shape[0] if self.side == "left" else math.prod(shape[1:])
        if not self.size or (self.order is not None and len(self.order) != length):
            return False
        return length % self.size == 0 if self.is_shared else length == size(self.blocks, 0) * self.size


@dataclass(frozen=True, slots=True)
class Multiplied:
    """W' = W (I + up @ down), such as a chain of reflections; a convolution is flattened to (out, in · prod(kernel)).

    Attributes: up: (in, rank); down: (rank, in).
    Source: peft 0.21.2, tuners/hra/layer.py.
    """

    up: LazyTensor
    down: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(0, in): the number of outputs only the base tells."""
        return (0, size(self.up, 0))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be multiplied so."""
        return len(shape) > 1 and math.prod(shape[1:]) == size(self.up, 0) == size(self.down, 1)


@dataclass(frozen=True, slots=True)
class ElementwiseScale:
    """HiRA: ΔW = W ∘ (up @ down), with W from the base: each value has its own factor.

    Attributes: up: (out, rank); down: (rank, in), for a convolution (rank, in · prod(kernel)).
    Source: peft 0.21.2, tuners/hira/layer.py `_merge`; tuners/glora/layer.py.
    """

    up: LazyTensor
    down: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in · prod(kernel)); meaningful when the factors fit."""
        return (size(self.up, 0), size(self.down, 1))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape`, in Linear orientation, can be modulated so."""
        is_product = size(self.up, 1) == size(self.down, 0)
        return is_product and len(shape) > 1 and (shape[0], math.prod(shape[1:])) == self.shape
