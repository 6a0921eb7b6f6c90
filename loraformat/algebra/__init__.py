"""Arithmetic on updates: norms from the factors. Pure; knows no files."""

from loraformat.algebra.norms import frobenius

__all__ = ["frobenius"]
