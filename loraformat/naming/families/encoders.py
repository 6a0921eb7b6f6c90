"""Text encoders: which component of a pipeline a file means by its own word, and where checkpoints in one file have it.

Source: diffusers 0.42.1, loaders/single_file_utils.py `create_diffusers_clip_model_from_ldm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# The slots of text encoders: kohya's numbers and ComfyUI's names → component, where a family does not say otherwise.
SLOTS: Mapping[str, str] = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5xxl": "text_encoder_3",
    "llama": "text_encoder",
}
_SLOTS_OF = {
    # T5 is the third encoder of sd-scripts, the second of OneTrainer and of the pipeline.
    "flux": {"te3": "text_encoder_2", "t5xxl": "text_encoder_2"},
    "chroma": {"t5xxl": "text_encoder", "te3": "text_encoder"},
    "hunyuan-video": {"clip_l": "text_encoder_2", "te2": "text_encoder_2"},
}


@dataclass(frozen=True, slots=True)
class Home:
    """Where a checkpoint in one file has a component.

    Attributes:
        prefix: before the names of its weights.
        is_open_clip: whether these are the names of OpenCLIP, where query, key and value are one weight.
    """

    prefix: str
    is_open_clip: bool = False


# Prefix → (component, whether OpenCLIP's names follow). The refiner of XL has the second encoder alone.
_HOMES = {
    "cond_stage_model.transformer.": ("text_encoder", False),
    "cond_stage_model.model.": ("text_encoder", True),
    "conditioner.embedders.0.transformer.": ("text_encoder", False),
    "conditioner.embedders.0.model.": ("text_encoder_2", True),
    "conditioner.embedders.1.model.": ("text_encoder_2", True),
}


def component_of_slot(slot: str, family: str) -> str:
    """The component that a slot means in the pipelines of a family, "" for an unknown family."""
    return _SLOTS_OF.get(family, {}).get(slot, SLOTS[slot])


def homes_of(names: Iterable[str], family: str) -> dict[str, Home]:
    """Component → where a checkpoint in one file has it; {} for a file of one component.

    >>> homes_of(["conditioner.embedders.1.model.ln_final.weight"], "sdxl")
    {'text_encoder_2': Home(prefix='conditioner.embedders.1.model.', is_open_clip=True)}
    """
    found: dict[str, Home] = {}
    for name in names:
        slot = name.removeprefix("text_encoders.").partition(".transformer.")[0]
        if name.startswith("text_encoders.") and slot in SLOTS:
            found.setdefault(component_of_slot(slot, family), Home(f"text_encoders.{slot}.transformer."))
            continue
        for prefix, (component, is_open_clip) in _HOMES.items():
            if name.startswith(prefix):
                found.setdefault(component, Home(prefix, is_open_clip))
    return found
