"""Hugging Face PEFT: adapter_config.json and adapter_model.safetensors or .bin."""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.kit.fields import readable
from loraformat.formats.kit.pairs.torchtune_file import own_file
from loraformat.formats.peft.components import components_of
from loraformat.formats.peft.keys import CONFIG, WEIGHTS
from loraformat.formats.peft.read import read
from loraformat.formats.peft.write import losses, write
from loraformat.model.bundle import Bundle

NAME = "peft"
TITLE = "Hugging Face PEFT: adapter_config.json and adapter_model.{safetensors,bin}"
SPEC = "docs/formats/peft.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors", "torch")
READS: tuple[str, ...] = (
    "linear",
    "embedding",
    "convolution",
    "dora",
    "bias",
    "full weights",
    "trained rows",
    "dense delta",
    "experts",
    "init subtracted from the base (PiSSA, OLoRA)",
    "LoHa/LoKr",
    "multiplicative (IA3, OFT …)",
)
HOLDS: tuple[str, ...] = ("linear", "embedding", "convolution", "dora", "bias", "full weights", "trained rows")
LOSES = "vocabulary sizes, and which tables are tied"

__all__ = [
    "CONTAINERS",
    "HOLDS",
    "LOSES",
    "NAME",
    "READS",
    "SPEC",
    "TITLE",
    "WRITES",
    "config",
    "losses",
    "read",
    "sniff",
    "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By file names; a config alone must have `peft_type`, because other tools call theirs the same.

    An export that lies beside torchtune's own file is left to torchtune's format: it is not right for every base. A
    config without `peft_type` and `target_modules` is Tinker's.
    """
    config = readable(bundle, CONFIG)
    is_tinker = isinstance(config, dict) and "r" in config and not {"peft_type", "target_modules"} & config.keys()
    if is_tinker or own_file(bundle) is not None:
        return None
    components = components_of(bundle)
    if components and all(f"{name}/{CONFIG}" in bundle.files for name in components):
        return Match(certain=True, reason=f"{CONFIG} is in {', '.join(components)}")
    weights = next((name for name in WEIGHTS.values() if name in bundle.files), None)
    if weights:
        return Match(certain=True, reason=f"{weights} is present")
    if isinstance(config, dict) and "peft_type" in config:
        return Match(certain=True, reason=f"{CONFIG} has peft_type")
    return None
