"""Tuners that make a low-rank update of a projection of the base weight: DEFT and PEANuT; and OSF, which has its own.

Source: peft 0.21.2, tuners/deft/layer.py `_project`, `get_delta_weight`; tuners/peanut/layer.py
`_compute_delta_weight`; tuners/osf/layer.py `get_delta_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import multiply, orthonormal
from loraformat.diagnostics import in_file, in_weights
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, exact, require
from loraformat.model.floats import float64_of
from loraformat.model.updates import ACTIVATIONS, LowRank, SubtractedInit, Update, WeightNetwork

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

# How far the cosines of two computations of one orthonormal column may be from 1.
_SAME = 1e-3


def _deft(source: Source, module: str, parts: Parts) -> Chains:
    """ΔW = Q (s R - Kᵀ W): Q and K are P and relu(P), or both the Q of P = QR; with `para` there is no R."""
    directions, injected = parts.get("deft_P"), parts.get("deft_R")
    is_para = source.flag("para")
    if directions is None or (injected is None and not is_para):
        return {}
    method = source.text("decomposition_method", "relu")
    if method not in ("qr", "relu"):
        raise UnsupportedUpdate(f"DEFT with {method} is not supported", where=in_file(CONFIG, "decomposition_method"))
    out, rank = directions.shape
    up = down = directions
    if method == "qr":
        require(rank <= out, module, f"deft_P {directions.shape} has more columns than rows")
        up = down = exact((out, rank), lambda: _orthonormal(float64_of(directions), module, has_signs=not is_para))
    else:
        down = exact((out, rank), lambda: _rectified(float64_of(directions)))
    chain: tuple[Update, ...] = (WeightNetwork(up, down.T, -1.0),)
    if injected is not None and not is_para:
        require(injected.shape[0] == rank, module, f"deft_R {injected.shape} does not fit deft_P {directions.shape}")
        alpha = source.number("alpha", 0)
        chain = (LowRank(up, injected, alpha / rank if alpha else 1.0), *chain)
    return {f"{module}.weight": chain}


def _rectified(values: Floats) -> Floats:
    import numpy as np

    return np.where(values < 0, 0.0, values)  # NaN stays


def _orthonormal(columns: Floats, module: str, *, has_signs: bool) -> Floats:
    """Q of columns = QR as LAPACK has it, whose first reflection turns each column away from its leading value.

    Raises: UnsupportedUpdate (LF013): float32, in which PEFT computes it, has another one: columns depend on each
        other, or a leading value is so small that its sign is one of rounding.
    """
    import numpy as np

    if not np.isfinite(columns).all():
        return columns
    found = orthonormal(columns)
    cosines = multiply(found.T, orthonormal(columns.astype(np.float32)).astype(np.float64))
    if not np.abs((cosines if has_signs else np.abs(cosines)) - np.eye(len(cosines))).max() < _SAME:
        raise UnsupportedUpdate(
            "the QR decomposition of deft_P in float32, as PEFT computes it, is ambiguous",
            where=in_weights(module),
        )
    return found


DEFT = Tuner(
    parts={"deft_P": (2,), "deft_R": (2,)},
    read=_deft,
    settings=("alpha", "decomposition_method", "deft_dropout", "init_scale", "init_weights", "para", "r"),
)

# As many hidden layers as names are known for.
_MOST_DEPTH = 64
_NETWORK = ("peanut_encoders.{}.weight", "peanut_decoders.{}.weight")


def _peanut(source: Source, module: str, parts: Parts) -> Chains:
    """ΔW = s · B f(A W), f a network of an activation and pairs of encoder and decoder; see `WeightNetwork`."""
    down, up = parts.get("peanut_A.weight"), parts.get("peanut_B.weight")
    depth = source.integer("depth", 0, low=0, high=_MOST_DEPTH)
    names = [[form.format(number) for number in range(depth)] for form in _NETWORK]
    if down is None or up is None or any(name not in parts for kind in names for name in kind):
        return {}
    activation = source.text("act_fn", "relu")
    if activation not in ACTIVATIONS:
        raise UnsupportedUpdate(
            f"PEANuT with the activation {activation} is not supported: it is unknown, or its parameters are in "
            "no file",
            where=in_file(CONFIG, "act_fn"),
        )
    rank = down.shape[0]
    encoders, decoders = (tuple(parts[name] for name in kind) for kind in names)
    fits = up.shape[1] == rank and all(layer.shape == (rank, rank) for layer in (*encoders, *decoders))
    require(fits, module, f"peanut_A {down.shape}, peanut_B {up.shape} and the layers between them do not fit")
    scale = source.number("scaling", 1.0)
    return {f"{module}.weight": (WeightNetwork(up, down, scale, activation, encoders, decoders),)}


PEANUT = Tuner(
    parts={
        **dict.fromkeys(("peanut_A.weight", "peanut_B.weight"), (2,)),
        **{form.format(number): (2,) for form in _NETWORK for number in range(_MOST_DEPTH)},
    },
    read=_peanut,
    settings=("act_fn", "depth", "init_weights", "r", "scaling"),
)


def _osf(source: Source, module: str, parts: Parts) -> Chains:
    """The smallest singular components of W are replaced by U diag(S) V, as many as the file has."""
    del source
    left, values, right = (parts.get(f"osf_svd_params.{name}_low") for name in "USV")
    if left is None or values is None or right is None:
        return {}
    rank = values.numel
    fits = left.shape[1] == rank == right.shape[0] and rank <= min(left.shape[0], right.shape[1])
    require(fits, module, f"U_low {left.shape}, S_low {values.shape} and V_low {right.shape} do not fit")
    shape = (left.shape[0], right.shape[1])
    up = exact(left.shape, lambda: float64_of(left) * float64_of(values))
    return {f"{module}.weight": (SubtractedInit("osf", rank, None, shape), LowRank(up, right, 1.0))}


OSF = Tuner(
    parts={"osf_svd_params.U_low": (2,), "osf_svd_params.S_low": (1,), "osf_svd_params.V_low": (2,)},
    read=_osf,
    settings=("effective_rank", "init_weights", "rank_pattern", "target_svd_config"),
)
