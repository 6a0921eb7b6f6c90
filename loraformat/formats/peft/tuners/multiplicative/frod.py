"""FRoD: the base weight in a basis that layers of one name share, its coordinates turned and stretched.

W = U diag(λ₀) Vᵀ becomes U (S + diag(λ)) Vᵀ. V, and where S has values, are in the file; U is computed from W and V.
Source: peft 0.21.2, tuners/frod/layer.py `_calculate_frod_u_and_lambda`, `get_delta_weight`; tuners/frod/model.py
`_category_from_key`, `_projection_from_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import multiply
from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, exact, integers, require
from loraformat.model.floats import float64_of
from loraformat.model.updates import FRoD

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def _read(source: Source, module: str, parts: Parts) -> Chains:
    stretched, turned = parts.get("frod_lambda_l"), parts.get("frod_lambda_s_values")
    if stretched is None or turned is None:
        return {}
    category = _category(module)
    basis, places = source.shared.get(f"frod_V.{category}"), source.shared.get(f"frod_s_indices.{category}")
    if basis is None or places is None:
        raise UnsupportedUpdate(
            f"FRoD without its projections (frod_V.{category}): they are singular vectors of the base's weights, whose "
            "signs are arbitrary",
            where=in_file(CONFIG, "save_projection"),
            hint="save it again with save_projection=True",
        )
    into = stretched.numel
    fits = basis.shape == (into, into) and places.shape == (2, turned.numel)
    require(fits, module, f"frod_V {basis.shape}, frod_s_indices {places.shape} and frod_lambda_l ({into},) do not fit")

    def core() -> Floats:
        import numpy as np

        numbers = integers(places)
        is_inside = bool(((numbers >= 0) & (numbers < into)).all())
        require(is_inside, module, f"frod_s_indices names values outside of {into} x {into}")
        middle = np.diag(float64_of(stretched))
        np.add.at(middle, (numbers[0], numbers[1]), float64_of(turned))
        return multiply(middle, float64_of(basis).T)

    return {f"{module}.weight": (FRoD(basis, exact((into, into), core)),)}


def _category(module: str) -> str:
    """By what name modules share a basis: the last component, and the one before it unless that is a number."""
    *before, last = module.split(".")
    if not before or before[-1].isdigit():
        return last
    if last == "dense" and before[-2:] == ["attention", "output"]:
        return "attention_output"
    return f"{before[-1]}_{last}"


FROD = Tuner(
    parts={"frod_lambda_l": (1,), "frod_lambda_s_values": (1,)},
    read=_read,
    settings=(
        *("frod_dropout", "init_weights", "progressbar", "projection_prng_key", "regularization_alpha"),
        *("runtime_offload_base_weight", "save_projection", "sparse_rate"),
    ),
    shared={"frod_V.": (2,), "frod_s_indices.": (2,), "frod_s_size.": (1,)},
    empty=("frod_lambda_s_values", "frod_s_indices."),
)
