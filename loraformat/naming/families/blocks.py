"""Blocks of image and video models as their users call them: IN04, MID and OUT05, double 7 and single 21."""

from __future__ import annotations

import re

from loraformat.naming.families.grammar import Family, spelled

# How names of the original begin → what the block is called, in the order in which they are shown. The numbers are the
# original's: IN04 is `input_blocks.4`, which diffusers calls a part of `down_blocks.1`.
_STACKS = (
    (re.compile(r"input_blocks\.(\d+)\."), "IN"),
    (re.compile(r"middle_block\.()"), "MID"),
    (re.compile(r"output_blocks\.(\d+)\."), "OUT"),
    (re.compile(r"(?:txt_in|context_embedder)\..*?blocks\.(\d+)\."), "refiner"),
    (re.compile(r"double_blocks\.(\d+)\."), "double"),
    (re.compile(r"single_(?:transformer_)?blocks\.(\d+)\."), "single"),
    (re.compile(r"joint_blocks\.(\d+)\."), "joint"),
    (re.compile(r"(?:transformer_)?blocks\.(\d+)\."), "block"),
    (re.compile(r"noise_refiner\.(\d+)\."), "noise"),
    (re.compile(r"context_refiner\.(\d+)\."), "context"),
    (re.compile(r"layers\.(\d+)\."), "layer"),
    (re.compile(r"distilled_guidance_layer\.\w+\.(\d+)\."), "guidance"),
)
_ENCODER_LAYER = re.compile(r"(?:^|\.)(?:layers|block|resblocks)\.(\d+)\.")
_ENCODERS = {f"text_encoder{end}": f"te{number}" for number, end in enumerate(("", "_2", "_3", "_4"), 1)}
_ORDER = (*_ENCODERS.values(), *(label for _, label in _STACKS))
_LABEL = re.compile(r"(?:(transformer_2) )?([A-Za-z]+\d??)(?: ?(\d+))?")
_WITH_TWO_DIGITS = ("IN", "OUT")


def block_of(component: str, module: str, family: Family | None, naming: str) -> str:
    """The block of a module; "" for one that stands in none.

    >>> from loraformat.naming.families import DIFFUSERS, ORIGINAL, family_named
    >>> block_of("unet", "down_blocks.1.attentions.0.proj_in", family_named("sdxl"), DIFFUSERS)
    'IN04'
    >>> block_of("transformer", "single_transformer_blocks.21.proj_mlp", family_named("flux"), DIFFUSERS)
    'single 21'
    >>> block_of("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", None, ORIGINAL)
    'te2 3'
    """
    if component in _ENCODERS:
        layer = _ENCODER_LAYER.search(module)
        return "" if layer is None else f"{_ENCODERS[component]} {layer[1]}"
    place = None if family is None else family.find(spelled(module), naming)
    name = module if place is None else place.original
    for pattern, label in _STACKS:
        found = pattern.match(f"{name}.")
        if found is not None:
            number = f"{int(found[1]):02}" if label in _WITH_TWO_DIGITS else f" {found[1]}" if found[1] else ""
            return f"{'transformer_2 ' if component == 'transformer_2' else ''}{label}{number}"
    return ""


def block_order(label: str) -> tuple[int, int, int]:
    """Where a block is shown among others: text encoders, then the denoiser from its input to its output.

    >>> sorted(["OUT00", "MID", "IN11", "IN04", "te1 3"], key=block_order)
    ['te1 3', 'IN04', 'IN11', 'MID', 'OUT00']
    """
    found = _LABEL.fullmatch(label)
    if found is None or found[2] not in _ORDER:
        return (0, len(_ORDER), 0)
    return (int(found[1] is not None), _ORDER.index(found[2]), int(found[3] or 0))
