"""Which update lands on which stored weight. Pure: one matcher for the merger and for the rules."""

from loraformat.matching.names import Landing, Matching, Misfit, match, nearest
from loraformat.matching.ties import TIE_KEYS, Tie, is_embedding, tie_claim, ties_of

__all__ = [
    "TIE_KEYS",
    "Landing",
    "Matching",
    "Misfit",
    "Tie",
    "is_embedding",
    "match",
    "nearest",
    "tie_claim",
    "ties_of",
]
