"""Weights put into the codes of their base's scheme again: only where that needs no data but the weights."""

from loraformat.containers.quantized.recoding.encoder import RECODED, Encoder, Part, encoder_of
from loraformat.containers.quantized.recoding.reference import decoded_rows, parts_of, rows_together, strayed

__all__ = ["RECODED", "Encoder", "Part", "decoded_rows", "encoder_of", "parts_of", "rows_together", "strayed"]
