"""Arithmetic on updates: norms, products and spectra from the factors. Pure; knows no files."""

from loraformat.algebra.factors import is_additive
from loraformat.algebra.norms import cosine, distance, frobenius, inner
from loraformat.algebra.spectrum import (
    Overlap,
    Spectrum,
    energy_ranks,
    norm_and_spectrum,
    overlap,
    spectrum,
    spectrum_of,
)

__all__ = [
    "Overlap",
    "Spectrum",
    "agreement",
    "cosine",
    "decomposition",
    "distance",
    "elementwise",
    "energy_ranks",
    "factors",
    "frobenius",
    "inner",
    "is_additive",
    "norm_and_spectrum",
    "norms",
    "outliers",
    "overlap",
    "rank_rules",
    "retention",
    "row_blocks",
    "shared_bases",
    "spectrum",
    "spectrum_of",
    "weights",
]
