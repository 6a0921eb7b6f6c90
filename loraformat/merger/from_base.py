"""Updates that are computed from the whole matrix of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import MergeError, ShapeMismatch
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import FromBase, LowRank

if TYPE_CHECKING:
    from torch import Tensor


def taken_off(update: FromBase, stored: Tensor, *, transposed: bool, where: str) -> LowRank:
    """What an initialisation took off a base matrix, as the low-rank update that takes it off again.

    Args:
        stored: the un-merged matrix as it is stored, float32 or float64.
        transposed: whether that is (in, out).
        where: for messages.

    Raises:
        MergeError (LF206): "olora" and the scale is unknown.
        ShapeMismatch (LF302): the matrix has fewer singular values than the rank.

    Source: peft 0.21.2, tuners/lora/layer.py `pissa_init`, `olora_init`; tuners/lora/variants.py `KasaLinearVariant`.
    """
    import torch

    rank = update.rank
    if rank > min(stored.shape):
        raise ShapeMismatch(f"rank {rank} is above those of a {tuple(stored.shape)} matrix", where=where)
    if update.recipe == "olora":
        if update.scale is None:
            raise MergeError("the scale is unknown: nobody stated alpha", where=where, hint="give it with --alpha A")
        left, right = torch.linalg.qr(stored)
        left, right, factor = left[:, :rank], right[:rank], -update.scale
    else:
        left, values, right = torch.linalg.svd(stored, full_matrices=False)
        kept = slice(None, rank) if update.recipe == "pissa" else slice(len(values) - rank, None)
        left, right, factor = left[:, kept] * values[kept], right[kept], -1.0
    if transposed:
        left, right = right.T, left.T
    return LowRank(LazyTensor.of(left.contiguous()), LazyTensor.of(right.contiguous()), factor)
