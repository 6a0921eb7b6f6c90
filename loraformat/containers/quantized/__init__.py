"""Quantized bases: the supported schemes, one module each.

A base of any other scheme is opened as the tensors in its files, and refused with the name of the scheme if its weights
are needed (`matching/quantized.py`).
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
