"""A second opinion on a merge: what the output must be, told from headers, configs and the formulas of the formats.

Nothing here is shared with what plans and computes a merge but the types of its data. What the plan says is compared
with it, never taken from it.
"""

from loraformat.merger.verify.reference.agreement import check_plan
from loraformat.merger.verify.reference.described import check_described
from loraformat.merger.verify.reference.expected import Expected, Reference, reference_of
from loraformat.merger.verify.reference.tensors import Computed

__all__ = [
    "Computed",
    "Expected",
    "Reference",
    "check_described",
    "check_plan",
    "kinds",
    "reference_of",
    "sources",
]
