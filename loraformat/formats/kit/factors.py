"""The factors of a low-rank update as files hold them (`A`, `B`) and as the hub does (`down`, `up`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.model.floats import float64_of
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import LowRank, Magnitude

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


def linear(a: LazyTensor, b: LazyTensor, scale: float | None, magnitude: LazyTensor | None = None) -> LowRank:
    """The update of a linear or convolution layer.

    Args:
        a: (rank, in), or (rank, in, *kernel) for a convolution.
        b: (out, rank), or (out, rank, 1, …) with as many ones as the kernel has axes.
        magnitude: DoRA's vector, (out,) or (1, out, 1, …), or None.
    Factors of other shapes are kept as they are, for the rules to judge.
    """
    vector = None if magnitude is None else Magnitude(_flat(magnitude, keep=1), axis=1)
    if len(a.shape) in (3, 4, 5) and _is_pointwise(b, len(a.shape)) and math.prod(a.shape) > 0:
        kernel = a.shape[2:]
        down = a.reshape(a.shape[0], math.prod(a.shape[1:]))
        return LowRank(b.reshape(b.shape[0], b.shape[1]), down, scale, vector, kernel)
    return LowRank(b, a, scale, vector)


def _is_pointwise(b: LazyTensor, axes: int) -> bool:
    return len(b.shape) == axes and all(size == 1 for size in b.shape[2:])


def _flat(vector: LazyTensor, keep: int) -> LazyTensor:
    """(1, n, 1, …) → (n,); anything else as it is."""
    shape = vector.shape
    if len(shape) > 1 and all(size == 1 for axis, size in enumerate(shape) if axis != keep):
        return vector.reshape(shape[keep])
    return vector


def embedding(a: LazyTensor, b: LazyTensor, scale: float | None, magnitude: LazyTensor | None = None) -> LowRank:
    """The update of an embedding table.

    Args:
        a: (rank, vocabulary).
        b: (dim, rank).
        magnitude: DoRA's vector, (dim,), or None.
    """
    vector = None if magnitude is None else Magnitude(magnitude, axis=0)
    return LowRank(_transposed(a), _transposed(b), scale, vector, is_embedding=True)


def _transposed(factor: LazyTensor) -> LazyTensor:
    return factor.T if len(factor.shape) == 2 else factor


def as_file(update: LowRank) -> tuple[LazyTensor, LazyTensor]:
    """(a, b) as `linear` and `embedding` take them."""
    if update.is_embedding:
        return _transposed(update.up), _transposed(update.down)
    if not update.kernel:
        return update.down, update.up
    rank, cols = update.down.shape
    ones = (1,) * len(update.kernel)
    a = update.down.reshape(rank, cols // math.prod(update.kernel), *update.kernel)
    return a, update.up.reshape(*update.up.shape, *ones)


def folded_core(core: LazyTensor, down: LazyTensor) -> LazyTensor:
    """Σ_j core[i, j, k, l] · down[j, c] as a matrix (rank, in · kernel): the second factor of a convolution's update.

    Computed in float64 when it is loaded, and rounded once to float32.

    Args:
        core: (rank, inner, *kernel).
        down: (inner, in).
    """
    rank, inner, *kernel = core.shape
    shape = (rank, down.shape[1] * math.prod(kernel))

    def read(start: int, stop: int) -> Values:
        import numpy as np

        from loraformat.arithmetic import multiply

        with np.errstate(all="ignore"):  # infinities and NaN are judged by whoever reads
            # (rank · kernel, inner) times (inner, in)
            places = float64_of(core).reshape(rank, inner, -1).transpose(0, 2, 1).reshape(-1, inner)
            columns = multiply(places, float64_of(down)).reshape(rank, -1, down.shape[1])
            return rounded(columns.transpose(0, 2, 1).reshape(shape)[start:stop], DType.F32)

    return LazyTensor(shape, DType.F32, read)
