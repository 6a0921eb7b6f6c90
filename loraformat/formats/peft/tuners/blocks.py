"""Adapters made of blocks: MiSS (and Bone, its older name), GraLoRA, C3A, DeLoRA; and BEFT, a bias alone.

Source: peft 0.21.2, tuners/miss/layer.py `get_delta_weight_miss`, `get_delta_weight` (0.15.0: tuners/bone);
tuners/gralora/layer.py, tuners/c3a/layer.py, tuners/delora/layer.py `get_delta_weight`; tuners/beft/layer.py `merge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import row_squares
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import DType, LazyTensor, rounded
from loraformat.model.updates import BlockAffine, Dense, LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values


def _miss(source: Source, module: str, parts: Parts) -> Chains:
    """ΔW[o, i] = block[i mod r, o]; in the variant "mini" the block's columns are repeated over the outputs."""
    block = parts.get("miss_block", parts.get("bone_block"))
    if block is None:
        return {}
    variant = source.raw.get("init_weights")
    if variant == "bat":
        return _bat(module, block)
    require(len(block.shape) == 2 and block.numel > 0, module, f"a block of shape {block.shape} is not a matrix")
    rank, columns = block.shape
    out, into = source.shape(module, out=None if variant == "mini" else columns)
    require(out % columns == 0, module, f"a block of {columns} outputs does not divide {out}")
    up = computed((out, rank), lambda: _repeated(float64_of(block).T, out // columns))
    return {f"{module}.weight": (LowRank(up, computed((rank, into), lambda: _cyclic(rank, into)), 1.0),)}


def _bat(module: str, blocks: LazyTensor) -> Chains:
    """Every tile T of the base becomes T + (T + I) M."""
    is_square = len(blocks.shape) == 3 and blocks.shape[1] == blocks.shape[2]
    require(is_square, module, f"blocks of shape {blocks.shape} are not square matrices, which the variant bat needs")
    return {f"{module}.weight": (BlockAffine(blocks),)}


def _cyclic(rank: int, into: int) -> Floats:
    """(rank, into): which input belongs to which row of the block."""
    import numpy as np

    return np.tile(np.eye(rank), (1, -(-into // rank)))[:, :into]


def _repeated(rows: Floats, times: int) -> Floats:
    """All rows, `times` times one below the other."""
    import numpy as np

    return np.tile(rows, (times, 1))


MISS = Tuner(
    parts={"miss_block": (2, 3), "bone_block": (2, 3)},
    read=_miss,
    settings=("bone_dropout", "init_weights", "miss_dropout", "mini_r", "r"),
)


def _gralora(source: Source, module: str, parts: Parts) -> Chains:
    """Each of the k x k blocks of ΔW is a product of r / k columns of its factors; all of them as one product."""
    a, b = parts.get("gralora_A"), parts.get("gralora_B")
    if a is None or b is None:
        return {}
    count, inner, rank = a.shape
    fits = b.shape[:2] == (count, rank) and rank % max(count, 1) == 0
    require(fits, module, f"gralora_A {a.shape} does not fit gralora_B {b.shape}")
    general = (parts.get("gralora_B_general.weight"), parts.get("gralora_A_general.weight"))
    hybrid = source.integer("hybrid_r", 0, low=0)
    scale = source.number("alpha", 64) / (rank + hybrid)
    updates = [
        LowRank(
            computed(
                (count * b.shape[2], count * rank), lambda: _spread(float64_of(b).transpose(0, 2, 1), own_first=False)
            ),
            computed((count * rank, count * inner), lambda: _spread(float64_of(a), own_first=True).T),
            scale,
        )
    ]
    if hybrid:
        if general[0] is None or general[1] is None:
            return {}
        updates.append(LowRank(general[0], general[1], scale))
    return {f"{module}.weight": tuple(updates)}


def _spread(factors: Floats, *, own_first: bool) -> Floats:
    """(k, n, r) as (k · n, k · r): what block j holds for block i, r / k columns, stands at place (i, j).

    Args:
        own_first: the rows belong to the inputs, whose block is j; else to the outputs, whose block is i.
    """
    import numpy as np

    count, length, rank = factors.shape
    part = rank // count
    spread = np.zeros((count, length, count, count, part))
    for own in range(count):
        values = factors[own].reshape(length, count, part)
        if own_first:
            spread[own, :, :, own] = values
        else:
            spread[own, :, own] = values
    return spread.reshape(count * length, count * rank)


GRALORA = Tuner(
    parts={
        "gralora_A": (3,),
        "gralora_B": (3,),
        "gralora_A_general.weight": (2,),
        "gralora_B_general.weight": (2,),
    },
    read=_gralora,
    settings=("alpha", "gralora_dropout", "gralora_k", "hybrid_r", "init_weights", "r"),
)


def _c3a(_source: Source, module: str, parts: Parts) -> Chains:
    kernels = parts.get("c3a_kernel")
    if kernels is None:
        return {}
    rows, columns, size = kernels.shape
    into = columns * size
    require(into > 0, module, f"c3a_kernel {kernels.shape} is empty")
    difference = LazyTensor((rows * size, into), DType.F32, lambda start, stop: _circulant(kernels, start, stop))
    return {f"{module}.weight": (Dense(difference, 1 / into),)}


def _circulant(kernels: LazyTensor, start: int, stop: int) -> Values:
    """Rows of the blocks: in block (m, n) row i, column j holds kernel[m, n, (j - i) mod size]."""
    import numpy as np

    size = kernels.shape[2]
    first = start // size
    values = rounded(kernels.read(first, -(-stop // size)), DType.F32)
    numbers = np.arange(start, stop) - first * size
    shifts = (np.arange(size) - numbers[:, None]) % size
    taken = values[numbers // size]  # (stop - start, columns, size)
    return np.take_along_axis(taken, shifts[:, None, :], axis=2).reshape(stop - start, -1)


C3A = Tuner(
    parts={"c3a_kernel": (3,)},
    read=_c3a,
    settings=("block_size", "block_size_pattern", "init_weights"),
)

_LEAST_NORM = 1e-4


def _delora(_source: Source, module: str, parts: Parts) -> Chains:
    """ΔW = B diag(λ / r / (‖A‖ ‖B‖)) A ∘ ‖W‖, with norms of the rows of A, the columns of B and the columns of W."""
    a, b, strength, norms = (parts.get(f"delora_{name}") for name in ("A", "B", "lambda", "w_norm"))
    if a is None or b is None or strength is None or norms is None:
        return {}
    fits = a.shape[0] == b.shape[1] and norms.shape == (a.shape[1],) and strength.numel == 1
    require(fits, module, f"delora_A {a.shape}, delora_B {b.shape} and delora_w_norm {norms.shape} do not fit")

    def down() -> Floats:
        import numpy as np

        left, right = float64_of(b), float64_of(a)
        lengths = np.maximum(_norms(left.T), _LEAST_NORM) * np.maximum(_norms(right), _LEAST_NORM)
        factors: Floats = float64_of(strength) / len(right) / lengths
        return np.asarray(factors[:, None] * right * float64_of(norms))

    return {f"{module}.weight": (LowRank(b, computed(a.shape, down), 1.0),)}


def _norms(rows: Floats) -> Floats:
    """(rows,): the length of each."""
    import numpy as np

    return np.sqrt(row_squares(rows))


DELORA = Tuner(
    parts={"delora_A": (2,), "delora_B": (2,), "delora_lambda": (1,), "delora_w_norm": (1,)},
    read=_delora,
    settings=("delora_lambda", "init_weights", "lambda_pattern", "module_dropout", "r", "rank_pattern"),
)


def _beft(_source: Source, module: str, parts: Parts) -> Chains:
    bias = parts.get("beft_bias")
    return {} if bias is None else {f"{module}.bias": (Dense(bias.reshape(bias.numel)),)}


BEFT = Tuner(parts={"beft_bias": (1, 2)}, read=_beft, settings=("init_weights",))
