"""minLoRA: torch parametrizations, one state dict. Read only.

Source: cccntu/minLoRA d47a4c9, minlora/model.py `LoRAParametrization`, utils.py `get_lora_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from loraformat.diagnostics import counted, in_weights
from loraformat.errors import ConfigError
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.pairs.read import Dialect, Layer, base_shape, read_pairs
from loraformat.formats.kit.pairs.spelling import MINLORA, Pair, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file
from loraformat.model.updates import LowRank

NAME = "minlora"
TITLE = "minLoRA: <module>.parametrizations.weight.0.lora_A and lora_B in one .pt file"
SPEC = "docs/formats/minlora.md"
READS: tuple[str, ...] = ("linear", "embedding", "convolution")

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A tensor file with names of torch parametrizations; opens its header."""
    file = the_file(bundle)
    pairs = {} if file is None else pairs_of(file.open().entries, MINLORA)[0]
    if file is None or not pairs:
        return None
    return Match(
        certain=True, reason=f"{file.name} has parametrizations.weight.0.lora_A for {counted(len(pairs), 'module')}"
    )


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of a minLoRA file. Alpha is not in it: the factor is alpha / rank.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        ConfigError (LF103): factors without a common rank, or that do not fit the base.
        FormatError (LF012): two names mean the same tensor.
    """
    return read_pairs(bundle, Dialect(spellings=MINLORA, build=_build), hints)


def _build(pairs: Mapping[str, Pair], rank: int | None, hints: Hints) -> dict[str, Layer]:
    return {module: _layer(module, pair, rank, base_shape(module, pair, hints)) for module, pair in pairs.items()}


def _layer(module: str, pair: Pair, rank: int | None, shape: tuple[int, ...] | None) -> Layer:
    """A (rank, in · prod(kernel)) and B (out, rank); of an embedding A (vocabulary, rank) and B (rank, dim)."""
    a, b = pair.factors
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ConfigError(f"expected matrices, found A {a.shape}, B {b.shape}", where=in_weights(module))
    size = None if not shape else (shape[0], math.prod(shape[1:]))
    straight = a.shape[0] == b.shape[1] and size in (None, (b.shape[0], a.shape[1]))
    swapped = a.shape[1] == b.shape[0] and size in (None, (a.shape[0], b.shape[1]))
    if straight and swapped and a.shape[0] != a.shape[1]:
        least = min(a.shape) if rank is None else rank
        straight, swapped = a.shape[0] == least, a.shape[1] == least
    if straight is swapped:
        why = "A and B have no common rank" if not straight else "the shapes fit both a layer and an embedding"
        against = f", the weight is {shape}" if shape else ""
        raise ConfigError(
            f"{why}: A {a.shape}, B {b.shape}{against}", where=in_weights(module), hint="pass the base with --base"
        )
    if swapped:
        return Layer(LowRank(a, b, None, is_embedding=True), a.shape[1])
    kernel = shape[2:] if shape is not None else ()
    return Layer(LowRank(b, a, None, kernel=kernel), a.shape[0])
