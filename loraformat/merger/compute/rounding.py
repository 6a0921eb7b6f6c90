"""From the sum to the output's dtype: to the nearest value, or up or down by chance that can be repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from loraformat.merger.plan.data import Arithmetic

if TYPE_CHECKING:
    from torch import Tensor

Rounder: TypeAlias = Callable[["Tensor", "Tensor", int], None]

_PER_BLOCK = 16  # 16-bit numbers in one block of Philox4x64


def rounder(arithmetic: Arithmetic, tensor: str) -> Rounder:
    """A function (output, values, index of the first value in the tensor) that fills `output`.

    By chance only where the output has 16 bits; wider outputs are always rounded to the nearest.
    """
    if arithmetic.rounding == "nearest":
        return _nearest
    key = int.from_bytes(hashlib.sha256(f"{arithmetic.seed}\n{tensor}".encode()).digest()[:16], "little")
    return lambda output, values, first: _stochastic(output, values, first, key)


def round_nearest(output: Tensor, values: Tensor) -> None:
    """Fill `output` with `values` rounded once, to the nearest, ties to even.

    torch goes from float64 to 16 bits by way of float32 and so rounds twice: 1 + 2^-8 + 2^-40 becomes 1 in bfloat16.
    Here the last bit of the float32 is set where it is not exact, and it is taken towards zero; what has 24 bits so
    rounds to 8 or 11 bits as the float64 does (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    import torch

    if values.dtype != torch.float64 or output.dtype not in (torch.bfloat16, torch.float16):
        output.copy_(values)
        return
    near = values.to(torch.float32)
    back, bits = near.to(torch.float64), near.view(torch.int32)
    bits.sub_((back.abs() > values.abs()).to(torch.int32)).bitwise_or_((back != values).to(torch.int32))
    output.copy_(near)


def keep_unchanged(output: Tensor, raw: Tensor, base: Tensor, update: Tensor) -> None:
    """Put the base's very bits where nothing is added to them, or where they are no number.

    -0, and what a NaN carries, would not come through an addition.

    Args:
        output, raw: as written and as stored; nothing is done where their dtypes differ.
        base, update: the values of `raw`, and what is added to them.
    """
    import torch

    if output.dtype == raw.dtype:
        output.copy_(torch.where((update == 0) | base.isnan(), raw, output))


def _nearest(output: Tensor, values: Tensor, first: int) -> None:
    del first
    round_nearest(output, values)


def _stochastic(output: Tensor, values: Tensor, first: int, key: int) -> None:
    """Up with the probability with which the value is nearer to the upper neighbour, so that errors cancel on average.

    The number drawn for an element depends on the seed, the tensor's name and the element's place in it alone.
    """
    import torch

    if output.dtype not in (torch.bfloat16, torch.float16):
        output.copy_(values)
        return
    exact = values.to(torch.float64)
    round_nearest(output, exact)
    size, bits = exact.abs(), output.view(torch.int16)
    # Magnitudes of 16-bit floats are ordered as their bits are: one less is the neighbour towards zero.
    below = (bits & 0x7FFF) - (output.to(torch.float64).abs() > size).to(torch.int16)
    low = below.view(output.dtype).to(torch.float64)
    high = (below + 1).view(output.dtype).to(torch.float64)
    chance = (size - low) / (high - low)
    up = _uniform(first, exact.numel(), key).view(exact.shape) < chance
    sign = torch.where(exact < 0, -0x8000, 0).to(torch.int16)
    rounded = (below + up.to(torch.int16)) | sign
    output.copy_(torch.where(output.isfinite() & (size > 0), rounded.view(output.dtype), output))


def _uniform(first: int, count: int, key: int) -> Tensor:
    """`count` numbers of a stream from number `first` on, in [0, 1) with 16 bits: Philox4x64-10 in counter mode."""
    import numpy as np
    import torch

    start, skip = divmod(first, _PER_BLOCK)
    blocks = -(-(skip + count) // _PER_BLOCK)
    drawn = np.random.Philox(key=key, counter=start).random_raw(blocks * 4)
    halves = drawn.astype("<u8", copy=False).view("<u2")[skip : skip + count]
    return torch.from_numpy(halves.astype(np.float64)).div_(65536.0)
