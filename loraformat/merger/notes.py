"""What a plan has to say before it is carried out: findings about it, from names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraformat.diagnostics import Finding
from loraformat.merger.findings import left_out, unlike_peft, whole_matrices
from loraformat.merger.plan import Edit, MergePlan
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import FromBase


def findings_of(plan: MergePlan, base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """Everything that a user should know about a plan.

    Args:
        base: as it is written, its layers repeated where the adapters want that.
    """
    if plan.left_out:
        yield left_out(plan.base, plan.left_out)
    if base.layers:
        text = f"{len(base.layers)} layers of their own are written; PEFT adds the updates of all copies of a layer up"
        yield unlike_peft(plan.base, text)
    decomposed = [edit for edit in plan.edits if any(_is_from_base(edit, adapters))]
    if decomposed:
        largest = max(edit.matrix[0] * edit.matrix[1] * 4 for edit in decomposed)
        yield whole_matrices(plan.base, len(decomposed), largest)


def _is_from_base(edit: Edit, adapters: Sequence[Adapter]) -> Iterator[bool]:
    for term in edit.terms:
        yield isinstance(adapters[term.adapter].updates[term.weight][term.index], FromBase)
