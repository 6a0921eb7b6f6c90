"""LitGPT: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml. Read only."""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.formats.litgpt.config import WEIGHTS
from loraformat.formats.litgpt.read import read
from loraformat.model.bundle import Bundle

NAME = "litgpt"
TITLE = "LitGPT: lit_model.pth.lora with hyperparameters.yaml and model_config.yaml"
SPEC = "docs/formats/litgpt.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By the name of the weight file."""
    return Match(certain=True, reason=f"{WEIGHTS} is there") if WEIGHTS in bundle.files else None
