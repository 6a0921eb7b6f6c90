"""LitGPT: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml."""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.litgpt.config import WEIGHTS
from loraformat.formats.litgpt.read import read
from loraformat.formats.litgpt.write import losses, write
from loraformat.model.bundle import Bundle

NAME = "litgpt"
TITLE = "LitGPT: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml"
SPEC = "docs/formats/litgpt.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("torch",)
READS: tuple[str, ...] = ("linear",)
HOLDS: tuple[str, ...] = ("linear",)
LOSES = "one rank and one scale for all layers: smaller ranks are padded, other scales folded into lora_B"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By the name of the weight file."""
    return Match(certain=True, reason=f"{WEIGHTS} is present") if WEIGHTS in bundle.files else None
