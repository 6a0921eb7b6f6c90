"""VB-LoRA: both factors are mixed from a bank of short vectors that all modules share.

Source: peft 0.21.2, tuners/vblora/layer.py `_get_low_rank_matrix`; utils/save_and_load.py (`save_only_topk_weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraformat.arithmetic import exp, fold
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, integers, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

Mix = Callable[[], "tuple[NDArray[np.int64], Floats]"]

_LOGITS, _INDICES, _WEIGHTS = "vblora_logits_{}", "vblora_logits_{}_topk_indices", "vblora_logits_{}_topk_weights"


def _read(source: Source, module: str, parts: Parts) -> Chains:
    bank = source.shared.get("vblora_vector_bank")
    if bank is None:
        return {}
    a, b = (_mix(source, module, parts, side, bank.shape[0]) for side in "AB")
    if a is None or b is None:
        return {}
    (rank, inputs), mix_a = a
    (outputs, width), mix_b = b
    length = bank.shape[1]
    require(rank == width, module, f"vblora_logits_A has rank {rank}, vblora_logits_B {width}")

    def down() -> Floats:
        return _mixed(bank, mix_a).reshape(rank, inputs * length)

    def up() -> Floats:
        columns: Floats = _mixed(bank, mix_b).transpose(0, 2, 1).reshape(outputs * length, rank)
        return columns

    factors = computed((outputs * length, rank), up), computed((rank, inputs * length), down)
    return {f"{module}.weight": (LowRank(*factors, 1.0),)}


def _mix(source: Source, module: str, parts: Parts, side: str, vectors: int) -> tuple[tuple[int, int], Mix] | None:
    """(the first two axes, what gives numbers of vectors and their shares) of one factor; None where it is missing."""
    logits = parts.get(_LOGITS.format(side))
    if logits is not None:
        top = source.integer("topk", 2)
        fits = top <= logits.shape[2] == vectors
        require(fits, module, f"vblora_logits_{side} {logits.shape} does not fit a bank of {vectors} with topk {top}")
        return (logits.shape[0], logits.shape[1]), lambda: _chosen(logits, top)
    indices, weights = parts.get(_INDICES.format(side)), parts.get(_WEIGHTS.format(side))
    if indices is None or weights is None:
        return None
    fits = indices.shape == (*weights.shape[:2], weights.shape[2] + 1)
    require(fits, module, f"indices {indices.shape} of vblora_logits_{side} do not fit weights {weights.shape}")

    def mix() -> tuple[NDArray[np.int64], Floats]:
        numbers, shares = _stored(indices, weights)
        is_inside = bool(((numbers >= 0) & (numbers < vectors)).all())
        require(is_inside, module, f"vblora_logits_{side} names vectors that the bank of {vectors} does not have")
        return numbers, shares

    return (indices.shape[0], indices.shape[1]), mix


def _chosen(logits: LazyTensor, top: int) -> tuple[NDArray[np.int64], Floats]:
    """(indices, softmax weights) of the largest logits. NaN is taken as the largest, so that it shows in the result."""
    import numpy as np

    values = float64_of(logits)
    numbers = np.argsort(np.where(np.isnan(values), -np.inf, -values), axis=-1, kind="stable")[..., :top]
    largest = np.take_along_axis(values, numbers, axis=-1)
    powers = exp(largest - largest[..., :1])
    return numbers, powers / fold(powers, -1)[..., None]


def _stored(indices: LazyTensor, weights: LazyTensor) -> tuple[NDArray[np.int64], Floats]:
    """The last share is not stored: all of them make one."""
    import numpy as np

    shares = float64_of(weights)
    return integers(indices), np.concatenate([shares, (1 - fold(shares, -1))[..., None]], axis=-1)


def _mixed(bank: LazyTensor, mix: Mix) -> Floats:
    """(…, length): the vectors of the bank, each times its share, added one after the other."""
    import numpy as np

    numbers, shares = mix()
    vectors = float64_of(bank)
    total = np.zeros((*numbers.shape[:-1], vectors.shape[1]))
    for place in range(numbers.shape[-1]):
        total += shares[..., place, None] * vectors[numbers[..., place]]
    return total


VBLORA = Tuner(
    parts={form.format(side): (3,) for form in (_LOGITS, _INDICES, _WEIGHTS) for side in "AB"},
    read=_read,
    settings=(
        *("init_logits_std", "init_vector_bank_bound", "num_vectors", "r", "save_only_topk_weights", "topk"),
        *("vblora_dropout", "vector_length"),
    ),
    shared={"vblora_vector_bank": (2,)},
)
