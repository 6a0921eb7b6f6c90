"""How other projects spell a weight: tables and string functions, no tensors."""

from loraformat.naming.ties import architecture_of, parts_cleanly, tied_names
from loraformat.naming.transformers import Spelled, Spelling, spelling_of

__all__ = ["Spelled", "Spelling", "architecture_of", "parts_cleanly", "spelling_of", "tied_names"]
