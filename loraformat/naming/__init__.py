"""How other projects spell a weight: tables and string functions, no tensors."""

from loraformat.naming.transformers import Spelled, Spelling, spelling_of

__all__ = ["Spelled", "Spelling", "spelling_of"]
