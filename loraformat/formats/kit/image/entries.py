"""The tensors that the updates of one module become in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraformat.formats.kit import factors
from loraformat.formats.kit.image.modules import BIAS, WEIGHT, Chains
from loraformat.formats.kit.normalize import multiplied
from loraformat.formats.kit.scaling import MAX_RANK, Scaling
from loraformat.model.floats import ROUNDOFF
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Update, kind_of

Entries = dict[str, LazyTensor]


class Fault(Exception):
    """Why an update cannot be written."""


class UnknownScale(Fault):
    """Nobody stated the scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Which tensors a dialect has.

    Attributes:
        down, up: roles of the factors.
        alpha: "always" has `.alpha`; "needed" where the scale is not 1 and cannot be worked into a factor exactly;
            "header" never, since the header states it.
        magnitude: role of DoRA's vector: "dora_scale" has both axes, "lora_magnitude_vector" one value an output.
        has_products: whether LoHa and LoKr can be written.
        has_dense: whether dense deltas of weights and biases can be.
        has_replacements: whether whole weights can be.
        bias: role of a bias that belongs to a pair and shares its scale; "" for none.
    """

    down: str
    up: str
    alpha: str
    magnitude: str
    has_products: bool = False
    has_dense: bool = False
    has_replacements: bool = False
    bias: str = ""


def entries_of(chains: Chains, spelling: Spelling) -> tuple[Entries, float | None]:
    """(role → tensor, bound of the relative error of values into which a scale was worked, or None for none).

    Raises: Fault: an update that the dialect cannot hold, or whose scale is unknown.
    """
    unknown = sorted(set(chains) - {WEIGHT, BIAS})
    if unknown:
        raise Fault(f"an update of a parameter {unknown[0]}")
    entries: Entries = {}
    error: float | None = None
    product: Update | None = None
    for update in _in_order(chains.get(WEIGHT, ())):
        if getattr(update, "scale", 1.0) is None:
            raise UnknownScale
        found, folded = _weight(update, spelling)
        if entries.keys() & found.keys():
            raise Fault("several updates of one kind of a weight")
        entries |= found
        error = _larger(error, folded)
        product = update if isinstance(update, LowRank) else product
    for update in chains.get(BIAS, ()):
        found, folded = _bias(update, product, spelling)
        if entries.keys() & found.keys():
            raise Fault("several updates of one bias")
        entries |= found
        error = _larger(error, folded)
    return entries, error


def _rounding(factor: float, dtype: DType) -> float | None:
    """Bound of the relative error of values that are multiplied; None where they stay as they are."""
    if factor == 1.0:
        return None
    return 0.0 if _is_power_of_two(factor) else ROUNDOFF.get(dtype, 1.0)


def _is_power_of_two(value: float) -> bool:
    """Whether multiplying by it changes exponents only."""
    return abs(math.frexp(value)[0]) == 0.5


def _larger(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)


def _in_order(chain: Sequence[Update]) -> Sequence[Update]:
    """The updates, where the order in which readers apply them is theirs: a new weight before what is added to it."""
    if any(isinstance(update, Replace) for update in chain[1:]):
        raise Fault("a weight that is both updated and replaced")
    return chain


def _weight(update: Update, spelling: Spelling) -> tuple[Entries, float | None]:
    if isinstance(update, LowRank):
        return _low_rank(update, spelling)
    if isinstance(update, Hadamard) and spelling.has_products:
        return _hadamard(update), None
    if isinstance(update, Kronecker) and spelling.has_products:
        return _kronecker(update)
    if isinstance(update, Dense) and spelling.has_dense:
        return _dense("diff", update)
    if isinstance(update, Replace) and spelling.has_replacements:
        return {"set_weight": update.value}, None
    kind = kind_of(update)
    raise Fault(f"an update of the kind {kind.name}")


def _low_rank(update: LowRank, spelling: Spelling) -> tuple[Entries, float | None]:
    scale = _known(update.scale)
    if update.is_embedding:
        raise Fault("a low-rank update of an embedding")
    if update.is_stack or len(update.up.shape) != 2 or len(update.down.shape) != 2:
        raise Fault("a stack of low-rank updates")
    if not 1 <= update.rank <= MAX_RANK:
        raise Fault(f"rank {update.rank}")
    entries: Entries = {}
    a, b = factors.as_file(update)
    if spelling.alpha == "always":
        entries["alpha"] = alpha_tensor(scale, update.rank)
    elif spelling.alpha == "needed" and scale != 1.0:
        if _folds(scale, update.up.dtype):
            b = multiplied(b, scale)
        else:
            entries["alpha"] = alpha_tensor(scale, update.rank)
    entries |= {spelling.down: a, spelling.up: b}
    if update.magnitude is not None:
        entries[spelling.magnitude] = _magnitude(update, spelling.magnitude)
    return entries, None


def _folds(scale: float, dtype: DType) -> bool:
    """Whether a scale works into values exactly: a power of two, in a dtype with exponents to spare."""
    return _is_power_of_two(scale) and dtype in (DType.F32, DType.F64, DType.BF16)


def _known(scale: float | None) -> float:
    if scale is None:
        raise UnknownScale
    return scale


def alpha_tensor(scale: float, rank: int) -> LazyTensor:
    """`.alpha`: the number that gives the scale, in float32 where that holds it."""
    import numpy as np

    alpha = Scaling().alpha(scale, rank)
    wide = float(np.float32(alpha)) != alpha
    return LazyTensor.of(np.asarray(alpha, np.float64 if wide else np.float32))


def _magnitude(update: LowRank, role: str) -> LazyTensor:
    magnitude = update.magnitude
    assert magnitude is not None
    ones = (1,) * len(update.kernel)
    count = magnitude.vector.numel
    if role == "dora_scale":
        return magnitude.vector.reshape(*((count, 1) if magnitude.axis == 1 else (1, count)), *ones)
    if magnitude.axis != 1:
        raise Fault("a DoRA magnitude for each input")
    # peft 0.21.2, tuners/lora/dora.py `DoraConv2dLayer`: (1, out, 1, 1)
    return magnitude.vector.reshape(1, count, *ones) if ones else magnitude.vector


def _hadamard(update: Hadamard) -> Entries:
    return {
        "alpha": alpha_tensor(_known(update.scale), update.rank),
        "hada_w1_a": update.up1,
        "hada_w1_b": update.down1,
        "hada_w2_a": update.up2,
        "hada_w2_b": update.down2,
    }


def _kronecker(update: Kronecker) -> tuple[Entries, float | None]:
    scale = _known(update.scale)
    left, right = update.left, update.right
    rank = right[1].shape[0] if len(right) == 2 else left[1].shape[0] if len(left) == 2 else None
    error = None
    if rank is None and scale != 1.0:  # readers ignore alpha where both sides are whole
        left = (multiplied(left[0], scale),)
        error = _rounding(scale, left[0].dtype)
    entries = {"alpha": alpha_tensor(1.0 if rank is None else scale, rank or 1)}
    for name, side in (("lokr_w1", left), ("lokr_w2", right)):
        roles = (name,) if len(side) == 1 else (f"{name}_a", f"{name}_b")
        entries |= dict(zip(roles, side, strict=True))
    return entries, error


def _dense(role: str, update: Dense) -> tuple[Entries, float | None]:
    scale = _known(update.scale)
    return {role: multiplied(update.delta, scale)}, _rounding(scale, update.delta.dtype)


def _bias(update: Update, product: Update | None, spelling: Spelling) -> tuple[Entries, float | None]:
    if not isinstance(update, Dense):
        raise Fault(f"{kind_of(update).noun} of a bias")
    if spelling.has_dense:
        return _dense("diff_b", update)
    if not spelling.bias or not isinstance(product, LowRank) or not product.scale or product.magnitude is not None:
        raise Fault("an update of a bias" if spelling.bias == "" else "an update of a bias without a pair")
    factor = _known(update.scale) / product.scale
    return {spelling.bias: multiplied(update.delta, factor)}, _rounding(factor, update.delta.dtype)
