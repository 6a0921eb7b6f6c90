"""Quantized bases: the table of the schemes that are read, each a module beside this one.

A base of any other scheme is opened as the tensors that stand in its files, and refused by name where its weights are
needed (`matching/quantized.py`).
"""

from __future__ import annotations

from loraformat.containers.quantized.decoding import decoded, laid_out, reference_rows
from loraformat.containers.quantized.scheme import SCHEMES, QuantizedScheme

__all__ = [
    "SCHEMES",
    "QuantizedScheme",
    "as_trained",
    "decoded",
    "laid_out",
    "recoding",
    "reference_rows",
]
