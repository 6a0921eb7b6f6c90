"""Verification of a merge's output."""

from loraformat.merger.verify.check import check_output

__all__ = ["check_output", "reference"]
