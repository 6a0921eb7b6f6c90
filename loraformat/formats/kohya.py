"""The files of kohya's sd-scripts and of musubi-tuner: flattened names, and `.alpha` for every module.

Source: sd-scripts 48d368fa, networks/lora.py, lora_flux.py; musubi-tuner 30c658c, networks.
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

NAME = "kohya"
TITLE = "kohya's scripts, musubi-tuner, OneTrainer: lora_unet_…, lora_te1_… in one file"
SPEC = "docs/formats/kohya.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors",)
READS: tuple[str, ...] = ("linear", "convolution", "dora", "bias", "full weights", "dense delta", "LoHa/LoKr")
HOLDS: tuple[str, ...] = ("linear", "convolution", "dora")
LOSES = "which of the two experts it is for"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

_DIALECT = Dialect(
    title="a kohya file",
    stem="lora",
    spelling=Spelling(down="lora_down.weight", up="lora_up.weight", alpha="always", magnitude="dora_scale"),
    naming=lambda family: family.kohya,
    prefix=prefixes.kohya,
    is_flat=True,
    has_experts=False,
    header=headers.of_trainer,
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
