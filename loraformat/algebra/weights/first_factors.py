"""The initial factors of an adapter, as PEFT draws or computes them.

Source: peft 0.21.2, tuners/lora/layer.py `reset_lora_parameters`, `orthogonal_init`, `pissa_init`, `olora_init`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.algebra.counted_random import gaussian, key_of, uniform
from loraformat.algebra.decomposition import decomposed
from loraformat.algebra.factors import Product

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# Those that are drawn, and those that are a part of the weight, which PEFT takes off the base when it loads them.
DRAWN = ("kaiming", "gaussian", "orthogonal")
PARTS = ("pissa", "olora")


def drawn(kind: str, shape: tuple[int, int], rank: int, seed: int, name: str) -> Product:
    """B and A of a layer: A is random and B zero, or both are random with BA = 0 (orthogonal, an even rank).

    >>> found = drawn("kaiming", (3, 4), 2, 0, "q_proj")
    >>> bool((abs(found.right) <= 0.5).all()), float(abs(found.left).max())
    (True, 0.0)

    Args:
        kind: one of DRAWN.
        shape: (out, in).
        seed, name: of which the numbers are a function, and of nothing else.
    """
    import numpy as np

    rows, cols = shape
    key = key_of(seed, "init", kind, name)
    if kind == "orthogonal":
        turned = np.linalg.qr(gaussian(key, rank, rank))[0]
        one = gaussian(key_of(seed, "init", kind, name, "A"), cols, rank // 2)
        other = gaussian(key_of(seed, "init", kind, name, "B"), rows, rank // 2)
        return Product(other @ turned[1::2] / 10.0, (one @ turned[0::2] / 10.0).T)
    if kind == "gaussian":
        return Product(np.zeros((rows, rank)), gaussian(key, rank, cols) / rank)
    # Kaiming's bound with a = √5: √(6 / ((1 + 5) · in)).
    return Product(
        np.zeros((rows, rank)), (2.0 * uniform(key, 0, rank * cols).reshape(rank, cols) - 1.0) / math.sqrt(cols)
    )


def drawn_for_table(shape: tuple[int, int], rank: int, seed: int, name: str) -> Product:
    """The same for a table of embeddings: its side of the rows is zero, the other normally distributed."""
    import numpy as np

    return Product(np.zeros((shape[0], rank)), gaussian(key_of(seed, "init", "table", name), rank, shape[1]))


def principal(weight: Floats, rank: int, scale: float) -> Product:
    """PiSSA: scale · BA is the best approximation of a rank of the weight, with √σ on both sides.

    Raises: ValueError: singular values at the border are equal, so it is not determined which vectors are meant.
    """
    found = decomposed(weight)
    if found.rank > rank and float(found.values[rank - 1] - found.values[rank]) <= _LEAST_GAP * float(found.values[0]):
        raise ValueError(f"singular values {rank} and {rank + 1} are equal")
    factors, root = found.factors(rank), 1.0 / math.sqrt(scale)
    return Product(factors.left * root, factors.right * root)


_LEAST_GAP = 2.0**-23  # relative to the largest, as float32 tells two singular values apart


def orthonormal(weight: Floats, rank: int) -> Product:
    """OLoRA: B and A are the first columns of Q and the first rows of R of the weight's QR decomposition."""
    import numpy as np

    columns, rows = np.linalg.qr(weight)
    return Product(columns[:, :rank], rows[:rank])
