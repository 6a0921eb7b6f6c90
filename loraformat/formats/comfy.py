"""ComfyUI's files: `diffusion_model.` before the names of the original's checkpoint.

Source: ComfyUI 0.26.1, comfy/lora.py `load_lora`, `model_lora_keys_unet`; comfy/weight_adapter.
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

NAME = "comfy"
TITLE = "ComfyUI: diffusion_model.… in one file; also the original model's names without diffusion_model."
SPEC = "docs/formats/comfy.md"
WRITES = True
CONTAINERS: tuple[str, ...] = ("safetensors",)
READS: tuple[str, ...] = ("linear", "convolution", "dora", "bias", "full weights", "dense delta", "LoHa/LoKr")
HOLDS: tuple[str, ...] = ("linear", "convolution", "dora", "full weights", "dense delta", "LoHa/LoKr")
LOSES = "which of the two experts it is for"

__all__ = [
    "CONTAINERS", "HOLDS", "LOSES", "NAME", "READS", "SPEC", "TITLE", "WRITES", "losses", "read", "sniff", "write",
]  # fmt: skip

_DIALECT = Dialect(
    title="a ComfyUI file",
    stem="lora",
    spelling=Spelling(
        down="lora_A.weight",
        up="lora_B.weight",
        alpha="needed",
        magnitude="dora_scale",
        has_products=True,
        has_dense=True,
        has_replacements=True,
    ),
    naming=lambda family: family.comfy,
    prefix=prefixes.comfy,
    is_flat=False,
    has_experts=False,
    header=headers.modelspec,
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
