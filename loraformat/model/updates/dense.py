"""Updates as large as their weight: one that is added, one that takes its place."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates.base import is_shape


@dataclass(frozen=True, slots=True)
class Dense:
    """ΔW = scale · delta, a dense matrix or vector, such as a trained bias of `lora_B`."""

    delta: LazyTensor
    scale: float | None = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.delta.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of `shape`, in Linear orientation."""
        return is_shape(self.shape, shape)


@dataclass(frozen=True, slots=True)
class Replace:
    """The whole tensor is replaced; its shape may differ from the base's only in the vocabulary axis of an embedding.

    Attributes:
        follows_tie: whether a tied partner follows the new table (hand-written folders, resized embeddings) or keeps
            the old one and is untied (PEFT's `modules_to_save`, which trains a copy).
    """

    value: LazyTensor
    follows_tie: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the new tensor."""
        return self.value.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Equal shapes, or another number of rows: a resized vocabulary, other labels, a head that the base lacks."""
        new = self.value.shape
        if shape[:1] == (0,):
            return new[1:] == shape[1:]
        return new == shape or (len(new) == 2 and len(shape) == 2 and new[1] == shape[1])
