"""XLabs' adapters of FLUX.1, which name the processors of attention. Read only.

Source: x-flux, src/flux/modules/layers.py `DoubleStreamBlockLoraProcessor`, `SingleStreamBlockLoraProcessor`.
"""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.kit.image.read import match_of, read
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.model.bundle import Bundle

NAME = "xlabs"
TITLE = "XLabs' FLUX adapters: double_blocks.N.processor.qkv_lora1.down.weight"
SPEC = "docs/formats/xlabs.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By names of tensors; opens the header."""
    return match_of(bundle, NAME)
