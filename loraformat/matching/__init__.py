"""Matches updates to stored weights. Pure: one matcher for the merger and for the rules."""

from loraformat.matching.fused import fused_with
from loraformat.matching.layers import replicated
from loraformat.matching.names import Landing, Matching, Misfit, match, prefix_of
from loraformat.matching.nearest import is_namesake, nearest
from loraformat.matching.orientation import CONV1D, is_class_known, is_conv1d
from loraformat.matching.quantized import Quantization, code_owner, left_over, quantization_of, quantized_weights
from loraformat.matching.rows import WHOLE, RowMap
from loraformat.matching.tasks import why_headless, with_task_head
from loraformat.matching.ties import (
    TIE_KEYS,
    Tie,
    is_embedding,
    is_head,
    is_linear,
    is_table,
    is_vocabulary,
    tie_claim,
    ties_of,
)

__all__ = [
    "CONV1D",
    "TIE_KEYS",
    "WHOLE",
    "Landing",
    "Matching",
    "Misfit",
    "Quantization",
    "RowMap",
    "Tie",
    "base_fingerprint",
    "code_owner",
    "fused_with",
    "is_class_known",
    "is_conv1d",
    "is_embedding",
    "is_head",
    "is_linear",
    "is_namesake",
    "is_table",
    "is_vocabulary",
    "left_over",
    "match",
    "nearest",
    "prefix_of",
    "quantization_of",
    "quantized_weights",
    "replicated",
    "tie_claim",
    "ties",
    "ties_of",
    "why_headless",
    "with_task_head",
]
