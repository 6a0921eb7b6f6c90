"""Quantizing merged weights again in their base's scheme, for schemes that need no calibration data."""

from loraformat.containers.quantized.recoding.encoder import RECODED, Encoder, Part, encoder_of
from loraformat.containers.quantized.recoding.reference import decoded_rows, parts_of, rows_together, strayed

__all__ = ["RECODED", "Encoder", "Part", "decoded_rows", "encoder_of", "parts_of", "rows_together", "strayed"]
