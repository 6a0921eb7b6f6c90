"""Microsoft's loralib: one state dict of `lora_A` and `lora_B`."""

from __future__ import annotations

from loraformat.diagnostics import counted
from loraformat.formats.kit.base import Match
from loraformat.formats.kit.pairs.spelling import are_loralib, pairs_of
from loraformat.formats.loralib.read import SETTINGS, read
from loraformat.formats.loralib.write import losses, write
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file

NAME = "loralib"
TITLE = "loralib: <module>.lora_A and .lora_B, (rank, in) and (out, rank), in one .pt file"
SPEC = "docs/formats/loralib.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("torch", "safetensors")
READS: tuple[str, ...] = ("linear", "embedding", "convolution", "bias", "full weights")
HOLDS: tuple[str, ...] = ("linear", "embedding", "convolution", "bias", "full weights")
LOSES = "one rank and one alpha for all, in a separate file; the name of the base"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A tensor file whose pairs are all called `.lora_A` and `.lora_B` and have loralib's shapes; opens its header.

    Our own writer's settings beside it are enough.
    """
    if SETTINGS in bundle.files:
        return Match(certain=True, reason=f"{SETTINGS} is present")
    file = the_file(bundle)
    if file is None or not are_loralib(file.open().entries):
        return None
    pairs, _ = pairs_of(file.open().entries)
    return Match(
        certain=False, reason=f"{file.name} has .lora_A of shape (rank, in) for {counted(len(pairs), 'module')}"
    )
