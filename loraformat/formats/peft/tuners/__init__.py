"""The tuners of PEFT other than LoRA, LoHa and LoKr: their readers, and why the others are not supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from loraformat.formats.peft.tuners.base import Source, Tuner

__all__ = ["REFUSED", "TUNERS", "Source", "Tuner", "lycoris"]

# peft_type → the module below this package and the name in it. A module is imported when its tuner is asked for.
_HOMES = {
    "ADALORA": ("adalora", "ADALORA"),
    "BEFT": ("blocks", "BEFT"),
    "BOFT": ("multiplicative.rotations", "BOFT"),
    "BONE": ("blocks", "MISS"),
    "C3A": ("blocks", "C3A"),
    "DEFT": ("projected", "DEFT"),
    "DELORA": ("blocks", "DELORA"),
    "FOURIERFT": ("sparse", "FOURIERFT"),
    "FROD": ("multiplicative.frod", "FROD"),
    "GLORA": ("glora", "GLORA"),
    "GRALORA": ("blocks", "GRALORA"),
    "HIRA": ("multiplicative.hira", "HIRA"),
    "HRA": ("multiplicative.rotations", "HRA"),
    "IA3": ("multiplicative.ia3", "IA3"),
    "LN_TUNING": ("replaced", "LN_TUNING"),
    "MISS": ("blocks", "MISS"),
    "OFT": ("multiplicative.rotations", "OFT"),
    "OSF": ("projected", "OSF"),
    "PEANUT": ("projected", "PEANUT"),
    "PVERA": ("shared.vera", "PVERA"),
    "RANDLORA": ("shared.randlora", "RANDLORA"),
    "ROAD": ("multiplicative.rotations", "ROAD"),
    "SHIRA": ("sparse", "SHIRA"),
    "SUPERTUNING": ("sparse", "SUPERTUNING"),
    "TINYLORA": ("shared.tiny", "TINYLORA"),
    "TRAINABLE_TOKENS": ("replaced", "TRAINABLE_TOKENS"),
    "UNILORA": ("shared.tiny", "UNILORA"),
    "VBLORA": ("shared.vblora", "VBLORA"),
    "VERA": ("shared.vera", "VERA"),
    "WAVEFT": ("waveft", "WAVEFT"),
}


class _Tuners(Mapping[str, Tuner]):
    def __getitem__(self, name: str) -> Tuner:
        module, attribute = _HOMES[name]
        found = getattr(import_module(f"loraformat.formats.peft.tuners.{module}"), attribute)
        assert isinstance(found, Tuner)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)

    def __contains__(self, name: object) -> bool:
        return name in _HOMES


TUNERS: Mapping[str, Tuner] = _Tuners()

_PROMPT = "it changes the model's input, so there is no weight to merge it into"
_ROUTED = "what it adds depends on the input, so it cannot be merged into a weight"
_SIGNS = "it rotates singular vectors of the base weight, which are recomputed and whose signs are in no file"
_CLUSTERS = "the rows that an update belongs to are found by clustering at each start, and are in no file"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _ROUTED),
    "ADAMSS": _CLUSTERS,
    "PSOFT": _SIGNS,
}
