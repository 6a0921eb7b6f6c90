"""The plan of a merge against the reference: which tensors change, and by which rows of which updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from loraformat.errors import MergeError
from loraformat.merger.plan.data import Edit, MergePlan, Term
from loraformat.merger.verify.reference.expected import HINT, Expected, Reference, Share

# Update, orientation, expert, first row of the update and of the tensor, strength.
_Told: TypeAlias = tuple[int, str, int, bool, "int | None", int, int, float]


def check_plan(plan: MergePlan, reference: Reference) -> frozenset[str]:
    """Compare names, dtypes, shapes and updates of every tensor.

    Returns: all tensors but those that updates land on of which the reference cannot tell where.

    Raises: MergeError (LF801): the plan would write something else.
    """
    planned = {tensor.name: (tensor.dtype, tensor.shape) for shard in plan.shards for tensor in shard.tensors}
    for edit in plan.edits:
        if edit.parts:
            planned = {name: one for name, one in planned.items() if name not in edit.written}
            planned[edit.tensor] = (edit.dtype, edit.shape)
    planned |= {name: planned[first] for shard in plan.shards for name, first in shard.aliases.items()}
    edits = {edit.tensor: edit for edit in plan.edits}
    edits |= {name: edits[first] for shard in plan.shards for name, first in shard.aliases.items() if first in edits}
    lost = {name for name, edit in edits.items() if any(term.adapter in reference.unfollowed for term in edit.terms)}
    if reference.unfollowed:  # what they part or add is not known either
        lost |= planned.keys() - reference.tensors.keys()
    names = {*planned, *reference.tensors} - lost
    for name in sorted(names):
        one = reference.tensors.get(name)
        if one is None or name not in planned:
            raise _error(name, f"the output {'lacks' if one else 'must not have'} this tensor")
        if planned[name] != (one.dtype.safetensors, one.shape):
            raise _error(name, f"planned as {planned[name]}, expected {(one.dtype.safetensors, one.shape)}")
        if bool(name in edits and edits[name].parts) is not (name in reference.recoded):
            raise _error(name, f"expected {'' if name in reference.recoded else 'not '}to be quantized again")
        if (name not in edits) is not (one.is_copy and name == one.origin):
            fault = "a change, expected a copy" if name in edits else "a copy, expected a change"
            raise _error(name, f"planned as {fault}")
        if name in edits:
            _check_edit(name, edits[name], one)
    return frozenset(names)


def _check_edit(name: str, edit: Edit, one: Expected) -> None:
    if edit.row_axes != one.axes and one.shares:
        raise _error(name, f"its rows span {edit.row_axes} axes, expected {one.axes}")
    said, must = [_told(term) for term in edit.terms], [_must(share) for share in one.shares]
    if said != must:
        number = next(
            (n for n, (a, b) in enumerate(zip(said, must, strict=False)) if a != b), min(len(said), len(must))
        )
        raise _error(name, f"planned with {_at(said, number)}, expected {_at(must, number)}")
    for term, share in zip(edit.terms, one.shares, strict=True):
        rows = term.part.rows
        if rows is not None and rows[1] - rows[0] != share.run.count:
            raise _error(name, f"{term.weight}: planned with {rows[1] - rows[0]} rows, expected {share.run.count}")


def _told(term: Term) -> _Told:
    first = 0 if term.part.rows is None else term.part.rows[0]
    return (
        *(term.adapter, term.weight, term.index, term.transposed),
        *(term.part.expert, first, term.part.at, term.strength),
    )


def _must(share: Share) -> _Told:
    run = share.run
    return (
        *(share.adapter, share.weight, share.index, share.is_transposed),
        *(run.expert, run.first, run.at, share.strength),
    )


def _at(several: Sequence[_Told], number: int) -> str:
    if number >= len(several):
        return "no more updates"
    adapter, weight, index, transposed, expert, first, at, strength = several[number]
    way = "transposed" if transposed else "as it is"
    matrix = "" if expert is None else f" of expert {expert}"
    rows = f"row {first}{matrix} at {at}, times {strength:g}"
    return f"update {index + 1} of {weight} of adapter {adapter + 1}, {way}, {rows}"


def _error(name: str, message: str) -> MergeError:
    return MergeError(f"{name}: {message}", where="verify", hint=HINT)
