"""Tuners that train one short vector for the whole model: UniLoRA and TinyLoRA, as far as the file says how it is used.

Source: peft 0.21.2, tuners/unilora/layer.py `_get_lora_matrices`; tuners/tinylora/layer.py `get_delta_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import multiply
from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, integers, require
from loraformat.model.floats import float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_ORDER = "depends on the order in which the model registers its modules, which is in no file"
_INDICES, _SCALES = "unilora_indices_{}", "unilora_scales_{}"


def _unilora(source: Source, module: str, parts: Parts) -> Chains:
    """A and B are values of one vector, picked by number and scaled each by its own factor."""
    vector = source.shared.get("unilora_theta_d")
    if vector is None or any(form.format(side) not in parts for form in (_INDICES, _SCALES) for side in "AB"):
        return {}
    (down, a), (up, b) = (_picked(vector, module, parts, side) for side in "AB")
    require(a[0] == b[1], module, f"unilora_indices_A has rank {a[0]}, unilora_indices_B {b[1]}")
    return {f"{module}.weight": (LowRank(up, down, 1.0),)}


def _picked(vector: LazyTensor, module: str, parts: Parts, side: str) -> tuple[LazyTensor, tuple[int, ...]]:
    indices, scales = parts[_INDICES.format(side)], parts[_SCALES.format(side)]
    fits = indices.shape == scales.shape
    require(fits, module, f"unilora_indices_{side} {indices.shape} does not fit unilora_scales_{side} {scales.shape}")

    def values() -> Floats:
        numbers, length = integers(indices), vector.shape[0]
        is_inside = bool(((numbers >= 0) & (numbers < length)).all())
        require(is_inside, module, f"unilora_indices_{side} names values that the vector of {length} does not have")
        return float64_of(vector)[numbers] * float64_of(scales)

    return computed(indices.shape, values), indices.shape


def _check_unilora(source: Source) -> None:
    if not source.flag("save_indices"):
        raise UnsupportedUpdate(
            f"UniLoRA without save_indices: the position of each value of its vector {_ORDER}",
            where=in_file("adapter_config.json"),
            hint="save it again with save_indices=True",
        )


def _tinylora(source: Source, module: str, parts: Parts) -> Chains:
    """B @ R @ A, where R is a sum of fixed matrices with the trained vector as factors."""
    vector = source.shared.get("tinylora_v.0")
    names = ("tinylora_A", "tinylora_B", "tinylora_P")
    if vector is None or any(name not in parts for name in names):
        return {}
    down, up, fixed = (parts[name] for name in names)
    rank = down.shape[0]
    fits = up.shape[1] == rank and fixed.shape == (vector.shape[0], rank, rank)
    require(fits, module, f"tinylora_B {up.shape} and tinylora_P {fixed.shape} do not fit tinylora_A {down.shape}")

    def turned() -> Floats:
        total = multiply(float64_of(vector)[None], float64_of(fixed).reshape(-1, rank * rank))
        return multiply(float64_of(up), total.reshape(rank, rank))

    return {f"{module}.weight": (LowRank(computed(up.shape, turned), down, 1.0),)}


def _check_tinylora(source: Source) -> None:
    if source.number("weight_tying", 0.0) != 1.0:
        raise UnsupportedUpdate(
            f"TinyLoRA with several vectors (weight_tying below 1): the assignment of vectors to modules {_ORDER}",
            where=in_file("adapter_config.json"),
        )
    if not source.flag("save_projection", default=True):
        raise UnsupportedUpdate(
            f"TinyLoRA without save_projection: the seed of a module's matrices {_ORDER}", where="adapter_config.json"
        )


UNILORA = Tuner(
    parts={form.format(side): (2,) for form in (_INDICES, _SCALES) for side in "AB"},
    read=_unilora,
    check=_check_unilora,
    settings=(
        *("init_theta_d_bound", "init_weights", "proj_seed", "r", "save_indices", "theta_d_length"),
        "unilora_dropout",
    ),
    shared={"unilora_theta_d": (1,)},
)
TINYLORA = Tuner(
    parts={"tinylora_A": (2,), "tinylora_B": (2,), "tinylora_P": (3,)},
    read=_tinylora,
    check=_check_tinylora,
    settings=(
        *("init_v_bound", "init_weights", "projection_seed", "r", "save_projection", "tinylora_dropout", "u"),
        "weight_tying",
    ),
    shared={"tinylora_v.0": (1,)},
)
