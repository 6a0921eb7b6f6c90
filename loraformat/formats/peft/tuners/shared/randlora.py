"""RandLoRA: random bases that all modules share, scaled in two directions by what was trained.

Source: peft 0.21.2, tuners/randlora/layer.py `get_scaled_bases`, `get_delta_weight`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.diagnostics import in_file
from loraformat.errors import UnsupportedUpdate
from loraformat.formats.peft.keys import CONFIG
from loraformat.formats.peft.tuners.base import Chains, Parts, Source, Tuner, computed, require
from loraformat.model.floats import float64_of
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def _read(source: Source, module: str, parts: Parts) -> Chains:
    trained, widths = parts.get("randlora_lambda"), parts.get("randlora_gamma")
    if trained is None or widths is None:
        return {}
    a, b = source.shared.get("randlora_A"), source.shared.get("randlora_B")
    if a is None or b is None:
        # PEFT draws them in bfloat16 or float16, as the machine has it: the seed alone does not give them back.
        raise UnsupportedUpdate("the random bases are not in the file", where=in_file(CONFIG, "save_projection"))
    (rank, bases), (_, shorter) = trained.shape, widths.shape
    out, into = source.shape(module)
    longer = max(out, into)
    require(
        widths.shape[0] == bases and min(out, into) == shorter, module, f"randlora_gamma {widths.shape} does not fit"
    )
    fits = a.shape[0] == b.shape[2] == rank and a.shape[2] >= shorter and b.shape[0] >= longer and b.shape[1] >= bases
    require(fits, module, f"randlora_A {a.shape} and randlora_B {b.shape} do not fit {out} x {into} at rank {rank}")

    total = rank * bases

    def short() -> Floats:
        values = float64_of(trained)[:, :, None] * float64_of(a)[:, :bases, :shorter] * float64_of(widths)
        return values.reshape(total, shorter)

    def long() -> Floats:
        return float64_of(b)[:longer, :bases].reshape(longer, total)

    if into == shorter:
        factors = computed((longer, total), long), computed((total, shorter), short)
    else:
        factors = computed((shorter, total), lambda: short().T), computed((total, longer), lambda: long().T)
    return {f"{module}.weight": (LowRank(*factors, source.number("randlora_alpha", 640) / rank),)}


# PEFT saves the bases once for the model, and again for each module.
_BASES = {"randlora_A": (3,), "randlora_B": (3,)}

RANDLORA = Tuner(
    parts={"randlora_lambda": (2,), "randlora_gamma": (2,), **_BASES},
    read=_read,
    settings=(
        *(
            "init_weights",
            "projection_prng_key",
            "r",
            "randlora_alpha",
            "randlora_dropout",
            "save_projection",
            "sparse",
        ),
        "very_sparse",
    ),
    shared=_BASES,
)
