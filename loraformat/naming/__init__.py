"""How other projects spell a weight: tables and string functions, no tensors."""

from loraformat.naming.litgpt import Family, family_of
from loraformat.naming.ties import architecture_of, parts_cleanly, tied_names
from loraformat.naming.transformers import Spelled, Spelling, spelling_of

__all__ = [
    "Family",
    "Spelled",
    "Spelling",
    "architecture_of",
    "family_of",
    "parts_cleanly",
    "spelling_of",
    "tied_names",
]
