"""loraformat's own layout: version 1 (docs/formats/native.md), and the hand-written folders that it grew out of."""

from __future__ import annotations

from loraformat.formats.kit.base import Match
from loraformat.formats.native.names import CONFIG, TABLES, WEIGHTS
from loraformat.formats.native.read import read
from loraformat.formats.native.write import losses, write
from loraformat.model.bundle import Bundle

NAME = "native"
TITLE = "loraformat folder: lora_config.json and lora_weights.{safetensors,pt}"
SPEC = "docs/formats/native.md"
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
)
HOLDS: tuple[str, ...] = READS
LOSES = "settings of other tools"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """By file names; a lone file is never this format."""
    if bundle.is_single_file:
        return None
    found = next((name for name in (CONFIG, *WEIGHTS.values(), *TABLES.values()) if name in bundle.files), None)
    return Match(certain=True, reason=f"{found} is present") if found else None
