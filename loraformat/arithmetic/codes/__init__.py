"""Codes of a few bits as the numbers that they mean: the decoding of quantized weights.

The compiled loop and numpy give the same bytes, as everywhere in `arithmetic`.
"""

from loraformat.arithmetic.codes.packed import CodedRows, Codes, decode
from loraformat.arithmetic.codes.plain import ACROSS, HIGH_FIRST, LOW_FIRST, unpacked

__all__ = ["ACROSS", "HIGH_FIRST", "LOW_FIRST", "CodedRows", "Codes", "decode", "unpacked"]
