"""Checks that every kind of update can be computed and verified, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraformat.merger.compute.combination import sparsity_of
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import MergePlan
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.updates import kind_of


def check_combination(plan: MergePlan, base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raises: UnsupportedUpdate (LF013): the method of a plan does not go with an update: see `sparsity_of`."""
    inputs = Inputs(base=base, adapters=list(adapters))
    for edit in plan.edits:
        sparsity_of(edit, inputs, plan.arithmetic)


def check_kinds(adapters: Iterable[Adapter]) -> None:
    """Compare the kinds of the adapters' updates with the tables that a merge needs.

    Raises: UnsupportedUpdate (LF013): one of the tables has no line for a kind.
    """
    updates = {type(each): each for adapter in adapters for chain in adapter.updates.values() for each in chain}
    if not updates:
        return
    from loraformat.merger.compute.kinds.arithmetic import check_arithmetic
    from loraformat.merger.verify.reference.kinds.effects import check_effects

    for update in updates.values():
        kind_of(update)
    check_arithmetic(updates)
    check_effects(updates)
