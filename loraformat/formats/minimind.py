"""minimind's LoRA files. Read only.

Source: jingyaogong/minimind 0305628, model/model_lora.py `LoRA`, `save_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.formats.kit import factors
from loraformat.formats.kit.base import NO_HINTS, Hints, Match
from loraformat.formats.kit.pairs.read import Dialect, Layer, read_pairs
from loraformat.formats.kit.pairs.spelling import MINIMIND, Pair, pairs_of
from loraformat.formats.kit.read_only import CONTAINERS, HOLDS, LOSES, WRITES, losses, write
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.model.format_files import the_file

NAME = "minimind"
TITLE = "minimind: <module>.lora.A.weight and .lora.B.weight in one .pth file"
SPEC = "docs/formats/minimind.md"
READS: tuple[str, ...] = ("linear",)

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip


def sniff(bundle: Bundle) -> Match | None:
    """A tensor file with pairs `.lora.A.weight` and `.lora.B.weight`, all of square layers; opens its header.

    minimind adapts no others. Code that does may have an alpha, and its files are dumps.
    """
    file = the_file(bundle)
    pairs = {} if file is None else pairs_of(file.open().entries, MINIMIND)[0]
    if file is None or not pairs or not all(_is_square(pair) for pair in pairs.values()):
        return None
    return Match(certain=True, reason=f"{file.name} has .lora.A.weight for {len(pairs)} square modules")


def _is_square(pair: Pair) -> bool:
    if pair.a is None or pair.b is None:
        return True
    a, b = (factor.shape for factor in pair.factors)
    return len(a) == len(b) == 2 and a == b[::-1]


def read(bundle: Bundle, *, hints: Hints = NO_HINTS) -> Adapter:
    """The adapter of such a file. Its code has no alpha: the factor is 1 unless the caller says otherwise.

    Raises:
        MissingFile (LF101): not exactly one tensor file.
        FormatError (LF012): two names mean the same tensor.
    """
    dialect = Dialect(spellings=MINIMIND, build=_build, scale=(1.0, "minimind's code, which has no alpha"))
    return read_pairs(bundle, dialect, hints)


def _build(pairs: Mapping[str, Pair], rank: int | None, hints: Hints) -> dict[str, Layer]:  # noqa: ARG001
    updates = {module: factors.linear(*pair.factors, None) for module, pair in pairs.items()}
    return {module: Layer(update, update.rank) for module, update in updates.items()}
