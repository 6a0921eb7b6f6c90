"""State-dict dumps of hand-written LoRA code: one file, any spelling, either orientation. Read only."""

from __future__ import annotations

from loraformat.diagnostics import counted
from loraformat.formats.dump.read import read
from loraformat.formats.kit.base import Match
from loraformat.formats.kit.pairs.spelling import are_loralib, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file

NAME = "dump"
TITLE = "a state dict of hand-written LoRA code in one .pt, .pth, .bin, .ckpt or .safetensors file"
SPEC = "docs/formats/dump.md"
READS: tuple[str, ...] = ("linear", "embedding", "convolution", "full weights")

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A single tensor file, or the only one of a folder, in which factors come in pairs; opens its header.

    A folder with another tool's config is none: what its factors mean stands there. Nor is what loralib may have
    written.
    """
    file = the_file(bundle)
    if file is None or are_loralib(file.open().entries):
        return None
    pairs, _ = pairs_of(file.open().entries)
    if not pairs:
        return None
    first = min(pairs)
    return Match(certain=False, reason=f"{file.name} has factors for {counted(len(pairs), 'module')}, first {first}")
