"""Family 4: the values themselves, read in blocks (`--deep`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.diagnostics import Severity, counted_of
from loraformat.model.tensors import LazyTensor, row_blocks
from loraformat.model.updates import LowRank, tensors
from loraformat.rules.base import Hit, Subject, rule
from loraformat.rules.shapes import name_of, updates_of

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_BLOCK_NBYTES = 16 << 20


@rule("LF401", Severity.WARNING, since="0.1.0", slow=True)
def zero_update(subject: Subject) -> Iterator[Hit]:
    """A factor of an update is all zero, so the update does nothing.

    ## Why it matters
    `lora_B` starts at zero. If it still is, the module was never trained: its layer was frozen, its parameters were not
    given to the optimizer, or the file was written before the first step.

    ## Example
    Every value of `q_proj.lora_B.weight` is 0.

    ## What to do
    Check that the parameters have `requires_grad` and that gradients reach them, and train again.

    ## Source
    Hu et al. 2021, arXiv 2106.09685, section 4.1; kohya_ss issue 811.
    """
    assert subject.adapter is not None
    for base_weight, update in updates_of(subject.adapter):
        if isinstance(update, LowRank):
            for name, factor in (("lora_B", update.up), ("lora_A", update.down)):
                if factor.numel and not any(bool(block.any()) for block in blocks(factor)):
                    yield Hit(base_weight, f"{name} is all zero")


@rule("LF402", Severity.ERROR, since="0.1.0", slow=True)
def non_finite_value(subject: Subject) -> Iterator[Hit]:
    """A tensor of an update holds NaN or infinity.

    ## Why it matters
    One such value makes a whole row or column of the merged weight NaN, and with it all outputs of the model.

    ## Example
    `q_proj.lora_A.weight` has a NaN: training diverged, or float16 overflowed.

    ## What to do
    Use an earlier checkpoint. Train in bfloat16 or with gradient clipping.

    ## Source
    IEEE 754; safetensors 0.8.0 does not look at values.
    """
    import numpy as np

    assert subject.adapter is not None
    for base_weight, update in updates_of(subject.adapter):
        for role, tensor in tensors(update):
            if tensor.dtype.is_floating:
                bad = sum(int((~np.isfinite(block)).sum()) for block in blocks(tensor))
                if bad:
                    yield Hit(base_weight, f"{name_of(role)}: {counted_of(bad, tensor.numel, 'value')} NaN or infinite")


def blocks(tensor: LazyTensor) -> Iterator[Values]:
    """The values, a block of whole rows at a time."""
    return (tensor.read(*rows) for rows in row_blocks(tensor.shape, tensor.dtype.itemsize, _BLOCK_NBYTES))
