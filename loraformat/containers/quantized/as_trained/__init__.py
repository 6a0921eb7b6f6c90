"""A dense base as QLoRA trains on it: its linear layers quantized as by bitsandbytes on loading, and decoded.

It is read like a quantized base in which each weight has one part, the dense tensor.
"""

from loraformat.containers.quantized.as_trained.loading import (
    as_trained,
    described,
    error_of,
    reference,
    rows,
    together,
    weights,
)
from loraformat.containers.quantized.as_trained.quantizer import Quantizer

__all__ = [
    "Quantizer",
    "as_trained",
    "described",
    "error_of",
    "quantizer",
    "reference",
    "rows",
    "together",
    "weights",
]
