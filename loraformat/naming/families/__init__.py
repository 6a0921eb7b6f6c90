"""The module names of image and video models, by family: how diffusers and the authors' own code call each module."""

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
    spelled,
    text_encoders,
)

__all__ = [
    "COMPONENTS",
    "DIFFUSERS",
    "ORIGINAL",
    "Family",
    "Module",
    "Place",
    "Spelled",
    "denoisers",
    "families",
    "family_named",
    "spelled",
    "text_encoders",
]
