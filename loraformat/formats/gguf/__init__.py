"""Adapters of llama.cpp and Ollama: one GGUF file."""

from __future__ import annotations

from loraformat.formats.gguf.read import read
from loraformat.formats.gguf.write import losses, write
from loraformat.formats.kit.base import Match
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file

NAME = "gguf"
TITLE = "llama.cpp and Ollama: one .gguf file of type adapter"
SPEC = "docs/formats/gguf.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("gguf",)
READS: tuple[str, ...] = ("linear", "embedding")
HOLDS: tuple[str, ...] = ("linear", "embedding")
LOSES = "one alpha for all: other scales are folded into lora_b"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "translate",
    "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A GGUF file whose header says that it is an adapter; opens it."""
    file = the_file(bundle)
    tensors = None if file is None else file.open()
    if (
        file is None
        or tensors is None
        or tensors.container != "gguf"
        or tensors.extras.get("general.type") != "adapter"
    ):
        return None
    return Match(certain=True, reason=f"{file.name} is a GGUF file of type adapter")
