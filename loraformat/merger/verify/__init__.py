"""The output of a merge against what it must be."""

from loraformat.merger.verify.check import check_output

__all__ = ["check_output", "reference"]
