"""LoHa and LoKr, on matrices and on convolutions, whose core tensors are folded into the second factor.

Source: peft 0.21.2, tuners/loha/layer.py `make_weight_cp`; tuners/lokr/layer.py `make_weight_cp`, `make_kron`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.formats.kit import factors
from loraformat.formats.peft.tuners.base import Parts, computed, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, Hadamard, Kronecker

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def product(module: str, parts: Parts, scale: float | None) -> Hadamard | Kronecker | Dense | None:
    """The update of a LoHa or LoKr module, or None where parts are missing.

    Raises: FormatError (LF012): a core tensor does not fit its factors.
    """
    first = _pair(module, parts, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _pair(module, parts, "hada_w2_a", "hada_w2_b", "hada_t2")
    if first and second:
        return Hadamard(*first, *second, scale)
    line = parts.get("lokr_w2")
    left, right = _kron_factors(module, parts, "lokr_w1", None), _kron_factors(module, parts, "lokr_w2", "lokr_t2")
    if left and line is not None and len(line.shape) == 3:
        return Dense(_line(left, line), scale)
    return Kronecker(left, right, scale) if left and right else None


def _line(left: tuple[LazyTensor, ...], right: LazyTensor) -> LazyTensor:
    """The update of a convolution along one axis as PEFT computes it: kron pairs the wrong axes, then it is reshaped.

    Training used that very product, so it is what the adapter means.

    Args:
        left: (a, b), or two factors of it.
        right: (c, d, k). The update is (a · c, b · d, k), from (1, a, b) ⊗ (c, d, k).
    """
    (rows, cols), (c, d, k) = (left[0].shape[0], left[-1].shape[1]), right.shape
    shape = (rows * c, cols * d, k)

    def value() -> Floats:
        from loraformat.arithmetic import multiply

        sides = [float64_of(factor) for factor in left]
        whole = multiply(*sides) if len(sides) > 1 else sides[0]
        return (whole[None, :, None, :, None] * float64_of(right)[:, None, :, None, :]).reshape(shape)

    return computed(shape, value)


def _kron_factors(module: str, parts: Parts, name: str, core: str | None) -> tuple[LazyTensor, ...]:
    whole = parts.get(name)
    if whole is None:
        return _pair(module, parts, f"{name}_a", f"{name}_b", core)
    return (whole.reshape(whole.shape[0], math.prod(whole.shape[1:])) if len(whole.shape) > 2 else whole,)


def _pair(
    module: str, parts: Parts, one: str, other: str, core: str | None
) -> tuple[LazyTensor, LazyTensor] | tuple[()]:
    a, b, t = parts.get(one), parts.get(other), parts.get(core) if core else None
    if a is None or b is None:
        return ()
    if t is None:
        return a, b
    fits = len(a.shape) == len(b.shape) == 2 and len(t.shape) == 4 and t.shape[:2] == (a.shape[0], b.shape[0])
    require(fits, module, f"{core} {t.shape} does not fit {one} {a.shape} and {other} {b.shape}")
    return a.T, factors.folded_core(t, b)
