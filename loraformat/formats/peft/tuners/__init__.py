"""The tuners of PEFT beside LoRA, LoHa and LoKr: which are read, by what, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.formats.peft.tuners.adalora import ADALORA
from loraformat.formats.peft.tuners.base import Source, Tuner
from loraformat.formats.peft.tuners.blocks import BEFT, C3A, DELORA, GRALORA, MISS
from loraformat.formats.peft.tuners.ia3 import IA3
from loraformat.formats.peft.tuners.randlora import RANDLORA
from loraformat.formats.peft.tuners.replaced import LN_TUNING, TRAINABLE_TOKENS
from loraformat.formats.peft.tuners.rotations import BOFT, HRA, OFT, ROAD
from loraformat.formats.peft.tuners.sparse import FOURIERFT, SHIRA, SUPERTUNING
from loraformat.formats.peft.tuners.vblora import VBLORA
from loraformat.formats.peft.tuners.vera import PVERA, VERA
from loraformat.formats.peft.tuners.waveft import WAVEFT

__all__ = ["REFUSED", "TUNERS", "Source", "Tuner"]

TUNERS: Mapping[str, Tuner] = {
    "ADALORA": ADALORA,
    "BEFT": BEFT,
    "BOFT": BOFT,
    "BONE": MISS,
    "C3A": C3A,
    "DELORA": DELORA,
    "FOURIERFT": FOURIERFT,
    "GRALORA": GRALORA,
    "HRA": HRA,
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "MISS": MISS,
    "OFT": OFT,
    "PVERA": PVERA,
    "RANDLORA": RANDLORA,
    "ROAD": ROAD,
    "SHIRA": SHIRA,
    "SUPERTUNING": SUPERTUNING,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
    "VBLORA": VBLORA,
    "VERA": VERA,
    "WAVEFT": WAVEFT,
}

_PROMPT = "it changes the input of the model, so there is no weight to merge it into"
_ROUTED = "what it adds depends on the input, so there is no one weight to merge it into"
_FROM_BASE = "its update is computed from the base weight"
_SEEDED = "part of it is drawn from seeds and not in the file"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _ROUTED),
    **dict.fromkeys(("ADAMSS", "DEFT", "FROD", "GLORA", "HIRA", "OSF", "PEANUT", "PSOFT"), _FROM_BASE),
    **dict.fromkeys(("UNILORA", "TINYLORA"), _SEEDED),
}
