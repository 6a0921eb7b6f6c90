"""The low-rank update of LoRA, and the magnitude that makes it DoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import is_shape


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA: each row or column of `W + ΔW` is divided by its norm and multiplied by `vector`.

    Attributes:
        vector: (rows,) where `axis` is 1, (cols,) where `axis` is 0.
        axis: along which the norms are taken: 1 for linear and convolution layers (a norm per output), 0 for embeddings
            (a norm per embedding dimension, over the vocabulary).

    Source: peft 0.21.2, tuners/lora/dora.py.
    """

    vector: LazyTensor
    axis: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """ΔW = scale · up @ down, in Linear orientation (out, in), whatever the file or the checkpoint stores.

    Attributes:
        up: (rows, rank): (out, rank); for an embedding (vocabulary, rank); for stacked experts (experts, rows, rank).
        down: (rank, cols): (rank, in); for an embedding (rank, dim); for a convolution (rank, in · prod(kernel)); for
            stacked experts (experts, rank, cols).
        scale: the factor that is applied, alpha / rank or alpha / sqrt(rank); None if unknown.
        magnitude: DoRA's vector, or None.
        kernel: () for a matrix; (k,), (kh, kw), (kd, kh, kw) for a convolution, whose update is (rows, in, *kernel).
        is_embedding: whether the weight is an embedding table, so that writers can spell it as their format does.
    """

    up: LazyTensor
    down: LazyTensor
    scale: float | None
    magnitude: Magnitude | None = None
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of `down`, of one expert where it is a stack."""
        return self.down.shape[-2] if len(self.down.shape) > 1 else math.prod(self.down.shape[:1])

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices, one for each expert, whose factors fit."""
        up, down = self.up.shape, self.down.shape
        return len(up) == len(down) == 3 and up[0] == down[0] and up[2] == down[1]

    def expert(self, number: int) -> tuple[LazyTensor, LazyTensor]:
        """(up, down) of one matrix of a stack."""
        up, down = (one.rows(number, number + 1).reshape(*one.shape[1:]) for one in (self.up, self.down))
        return up, down

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update; meaningful when the factors fit."""
        if self.is_stack:
            return (*self.up.shape[:2], self.down.shape[2])
        rows = self.up.shape[0] if self.up.shape else 0
        cols = self.down.shape[-1] if self.down.shape else 0
        return (rows, cols // math.prod(self.kernel), *self.kernel) if self.kernel else (rows, cols)

    @property
    def products(self) -> tuple[tuple[LazyTensor, LazyTensor], ...]:
        """The (up, down) that must fit as matrices; none of a stack of experts."""
        return () if self.is_stack else ((self.up, self.down),)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of `shape`, in Linear orientation, and its factors fit each other."""
        up, down = self.up.shape, self.down.shape
        if not self.is_stack and not (len(up) == len(down) == 2 and up[1] == down[0]):
            return False
        if self.magnitude is not None:
            count = shape[0] if self.magnitude.axis == 1 else shape[-1]
            if self.magnitude.vector.numel != count:
                return False
        return is_shape(self.shape, shape)
