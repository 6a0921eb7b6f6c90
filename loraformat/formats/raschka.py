"""The LoRA layers of "Build a Large Language Model (From Scratch)", appendix E. Read only.

Source: rasbt/LLMs-from-scratch 28c65cd, appendix-E/01_main-chapter-code/appendix-E.ipynb `LoRALayer`, `LinearWithLoRA`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.diagnostics import counted, in_weights
from loraformat.errors import ConfigError
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.pairs.read import Dialect, Layer, read_pairs
from loraformat.formats.kit.pairs.spelling import RASCHKA, Pair, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file
from loraformat.model.updates import LowRank

NAME = "raschka"
TITLE = "LLMs from scratch: <module>.lora.A and .lora.B, both (in, rank) and (rank, out), in one .pth file"
SPEC = "docs/formats/raschka.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A tensor file whose pairs are called `.lora.A` and `.lora.B` and share the inner axis; opens its header."""
    file = the_file(bundle)
    pairs = {} if file is None else pairs_of(file.open().entries, RASCHKA)[0]
    if file is None or not pairs or not all(_fits(pair) for pair in pairs.values()):
        return None
    return Match(
        certain=True, reason=f"{file.name} has .lora.A of shape (in, rank) for {counted(len(pairs), 'module')}"
    )


def _fits(pair: Pair) -> bool:
    if pair.a is None or pair.b is None:
        return True
    a, b = pair.factors
    return len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] and a.shape[1] <= min(a.shape[0], b.shape[1])


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of such a file. Alpha is not in it: the factor is alpha / rank, in the book's first printing alpha.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        ConfigError (LF103): factors without a common rank.
        FormatError (LF012): two names mean the same tensor.
    """
    return read_pairs(bundle, Dialect(spellings=RASCHKA, build=_build), hints)


def _build(pairs: Mapping[str, Pair], rank: int | None, hints: Hints) -> dict[str, Layer]:  # noqa: ARG001
    layers = {}
    for module, pair in pairs.items():
        a, b = pair.factors
        if not _fits(pair):
            message = f"expected A (in, rank) and B (rank, out), found A {a.shape}, B {b.shape}"
            raise ConfigError(message, where=in_weights(module), hint="--from dump reads either orientation")
        layers[module] = Layer(LowRank(b.T, a.T, None), a.shape[1])
    return layers
