"""LyCORIS' files: LoHa, LoKr, DoRA and plain pairs under flattened names of diffusers.

Source: lycoris_lora 4.1.3, lycoris/wrapper.py, lycoris/modules.
"""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.diagnostics import Finding
from loraformat.formats.kit.base import DEFAULT_OPTIONS, Match, WriteOptions
from loraformat.formats.kit.image import headers, prefixes
from loraformat.formats.kit.image.entries import Spelling
from loraformat.formats.kit.image.read import match_of, read
from loraformat.formats.kit.image.write import Dialect, losses_of, write_file
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle
from loraformat.naming.families import DIFFUSERS

NAME = "lycoris"
TITLE = "LyCORIS: LoHa, LoKr, DoRA and LoRA in one file, lycoris_…"
SPEC = "docs/formats/lycoris.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors",)
READS: tuple[str, ...] = ("linear", "convolution", "dora", "bias", "full weights", "dense delta", "LoHa/LoKr")
HOLDS: tuple[str, ...] = ("linear", "convolution", "dora", "dense delta", "LoHa/LoKr")
LOSES = "which of the two experts it is for"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

_DIALECT = Dialect(
    title="a LyCORIS file",
    stem="lycoris",
    spelling=Spelling(
        down="lora_down.weight",
        up="lora_up.weight",
        alpha="always",
        magnitude="dora_scale",
        has_products=True,
        has_dense=True,
    ),
    naming=lambda _family: DIFFUSERS,
    prefix=prefixes.lycoris,
    is_flat=True,
    has_experts=False,
    header=lambda adapter, plan: headers.of_trainer(adapter, plan, "lycoris.kohya"),
)


def sniff(bundle: Bundle) -> Match | None:
    """By names of tensors; opens the header."""
    return match_of(bundle, NAME)


def losses(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Iterator[Finding]:  # noqa: ARG001
    """What such a file cannot hold."""
    yield from losses_of(adapter, _DIALECT)


def write(adapter: Adapter, options: WriteOptions = DEFAULT_OPTIONS) -> Bundle:  # noqa: ARG001
    """A folder with one file.

    Raises: AssertionError: `losses` has an error-level finding.
    """
    return write_file(adapter, _DIALECT)
