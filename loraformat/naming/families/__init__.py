"""The module names of image and video models, by family: how diffusers and the authors' own code call each module."""

from loraformat.naming.families.blocks import block_of, block_order
from loraformat.naming.families.encoders import SLOTS, Home, component_of_slot, homes_of
from loraformat.naming.families.grammar import (
    COMPONENTS,
    DIFFUSERS,
    ORIGINAL,
    Family,
    Module,
    Place,
    Spelled,
    denoisers,
    families,
    family_named,
    likeliest,
    spelled,
    text_encoders,
)

__all__ = [
    "COMPONENTS",
    "DIFFUSERS",
    "ORIGINAL",
    "SLOTS",
    "Family",
    "Home",
    "Module",
    "Place",
    "Spelled",
    "block_of",
    "block_order",
    "component_of_slot",
    "denoisers",
    "families",
    "family_named",
    "homes_of",
    "likeliest",
    "spelled",
    "text_encoders",
]
