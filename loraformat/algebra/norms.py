"""Frobenius norms of updates, from Gram matrices of their factors; the product itself is never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    Diff,
    FromBase,
    Hadamard,
    Kronecker,
    LowRank,
    Modulated,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
)

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 65536  # rows of a factor that are in memory at a time


def frobenius(update: Update) -> float | None:
    """‖ΔW‖_F of an update, in float64; None where it has no meaning without the base, or no scale is known.

    For DoRA it is the norm of s·BA alone, before the magnitude is applied. `Replace` and `Rows` hold new values, not
    differences, so they have no norm here; what a kind that multiplies adds depends on the base.

    It is also None where factors do not fit each other, which the rules report.

    ‖s·BA‖_F² = s² · Σ (BᵀB ∘ AAᵀ), since ‖BA‖_F² = tr(AᵀBᵀBA).
    """
    if not all(_is_product(up, down) for up, down in _products(update)):
        return None
    if isinstance(update, Hadamard) and not update.is_even:
        return None
    match update:
        case LowRank():
            return _scaled(update.scale, lambda: product_norm(update.up, update.down))
        case Hadamard():
            return _scaled(update.scale, lambda: _hadamard_norm(update))
        case Kronecker():
            return _scaled(update.scale, lambda: _factors_norm(update.left) * _factors_norm(update.right))
        case Diff():
            return _scaled(update.scale, lambda: float(_flat(update.difference).norm()))
        case Replace() | Rows() | FromBase() | Scaled() | Rotated() | Multiplied() | Modulated():
            return None
        case _:
            assert_never(update)


def _products(update: Update) -> Iterator[tuple[LazyTensor, LazyTensor]]:
    if isinstance(update, LowRank):
        yield update.up, update.down
    elif isinstance(update, Hadamard):
        yield from ((update.up1, update.down1), (update.up2, update.down2))
    elif isinstance(update, Kronecker):
        yield from ((side[0], side[1]) for side in (update.left, update.right) if len(side) == 2)


def _is_product(up: LazyTensor, down: LazyTensor) -> bool:
    return len(up.shape) == 2 and len(down.shape) > 1 and up.shape[1] == down.shape[0] and bool(up.numel and down.numel)


def product_norm(up: LazyTensor, down: LazyTensor) -> float:
    """‖up @ down‖_F. up: (rows, rank); down: (rank, cols); or stacks of them; both of any floating dtype."""
    import torch

    if len(up.shape) == 3:
        return math.hypot(*(product_norm(_slice(up, n), _slice(down, n)) for n in range(up.shape[0])))
    right = down.load().to(torch.float64).reshape(down.shape[0], -1)
    return _gram_norm(_gram(up), right @ right.T)


def _slice(stack: LazyTensor, number: int) -> LazyTensor:
    return stack.rows(number, number + 1).reshape(*stack.shape[1:])


def _scaled(scale: float | None, norm: Callable[[], float]) -> float | None:
    return None if scale is None else abs(scale) * norm()


def _gram(up: LazyTensor) -> Tensor:
    """upᵀ @ up, (rank, rank), summed over blocks of rows."""
    import torch

    total = torch.zeros(up.shape[1], up.shape[1], dtype=torch.float64)
    for start in range(0, up.shape[0], _BLOCK):
        block = up.read(start, min(start + _BLOCK, up.shape[0])).to(torch.float64)
        total += block.T @ block
    return total


def _gram_norm(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum().clamp_min(0).sqrt())


def _hadamard_norm(update: Hadamard) -> float:
    """(U1 D1) ∘ (U2 D2) is itself a product, of the row-wise Kronecker products of its factors."""
    import torch

    first, second = (_flat(factor) for factor in (update.up1, update.up2))
    up = torch.einsum("ia,ib->iab", first, second).flatten(1)
    first, second = (_flat(factor) for factor in (update.down1, update.down2))
    down = torch.einsum("aj,bj->abj", first, second).flatten(0, 1)
    return _gram_norm(up.T @ up, down @ down.T)


def _factors_norm(factors: tuple[LazyTensor, ...]) -> float:
    if len(factors) == 1:
        return float(_flat(factors[0]).norm())
    return product_norm(factors[0], factors[1])


def _flat(tensor: LazyTensor) -> Tensor:
    import torch

    return tensor.load().to(torch.float64)
