"""diffusers' own files: `<component>.<module>.lora_A.weight`, and the scale in the header.

Source: diffusers 0.42.1, loaders/lora_base.py `write_lora_layers`, utils/peft_utils.py `_create_lora_config`.
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

NAME = "diffusers"
TITLE = "diffusers: unet., transformer., text_encoder. in pytorch_lora_weights.safetensors; the scale in the header"
SPEC = "docs/formats/diffusers.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors",)
READS: tuple[str, ...] = ("linear", "convolution", "dora", "bias", "full weights", "dense delta", "LoHa/LoKr")
HOLDS: tuple[str, ...] = ("linear", "convolution", "dora")
LOSES = ""

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

_DIALECT = Dialect(
    title="a diffusers file",
    stem="pytorch_lora_weights",
    spelling=Spelling(
        down="lora_A.weight",
        up="lora_B.weight",
        alpha="header",
        magnitude="lora_magnitude_vector",
        bias="lora_B.bias",
    ),
    naming=lambda _family: DIFFUSERS,
    prefix=prefixes.diffusers,
    is_flat=False,
    has_experts=True,
    header=headers.of_diffusers,
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
