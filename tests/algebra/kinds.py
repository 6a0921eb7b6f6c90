"""One update of each additive kind, of chosen sizes."""

from __future__ import annotations

import torch

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Magnitude, Update


def some(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[LazyTensor]:
    g = torch.Generator().manual_seed(seed)
    return [LazyTensor.of(torch.randn(*shape, generator=g).to(dtype)) for shape in shapes]


def updates(rows: int, cols: int, rank: int, seed: int) -> dict[str, Update]:
    """Every kind that adds, (rows, cols) but for Kronecker products, stacks and vectors."""
    up, down, up2, down2, full = some(seed, (rows, rank), (rank, cols), (rows, rank), (rank, cols), (rows, cols))
    halves = [LazyTensor.of(lazy.torch().to(dtype)) for lazy, dtype in ((up, torch.bfloat16), (down, torch.float16))]
    ups, downs = some(seed + 1, (3, rows, rank), (3, rank, cols))
    (kernel_down,) = some(seed + 2, (rank, cols * 4))
    vector, magnitude = some(seed + 3, (rows,), (rows,))
    return {
        "linear": LowRank(up, down, 0.7),
        "negative": LowRank(up, down, -3.0),
        "half precision": LowRank(*halves, 2.0),
        "embedding": LowRank(up, down, 1.5, is_embedding=True),
        "convolution": LowRank(up, kernel_down, 0.5, kernel=(2, 2)),
        "experts": LowRank(ups, downs, 0.5),
        "dora, before its magnitude": LowRank(up, down, 0.5, Magnitude(magnitude)),
        "loha": Hadamard(up, down, up2, down2, 0.3),
        "lokr of matrices": Kronecker((up,), (down,), 2.0),
        "lokr of factors": Kronecker((up, down), (up2, down2), 1.0),
        "lokr of both": Kronecker((up,), (up2, down2), -1.0),
        "dense": Dense(full, 0.5),
        "bias": Dense(vector, 1.0),
    }
