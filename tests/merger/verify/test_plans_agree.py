"""A plan that differs from the second opinion in one thing is refused, and the message names that thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merger.checkpoints import adapter, config, low_rank, save_base, weights
from torch import Tensor

from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError
from loraformat.matching import RowMap
from loraformat.merger import AdapterSource, Inputs, MergePlan, plan_merge
from loraformat.merger.plan.data import Edit, PlannedTensor, ShardPlan, Term
from loraformat.merger.verify.reference import check_plan, reference_of
from loraformat.merger.verify.reference.expected import Reference
from loraformat.model.adapter import Adapter
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, K = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
DISK, MEMORY = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"


def planned(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], *changes: Adapter
) -> tuple[MergePlan, Reference]:
    """A right plan, and what the second opinion wants."""
    base = open_checkpoint(str(save_base(folder / "base", tensors, settings)))
    plan = plan_merge(base, changes, [AdapterSource("memory", "none") for _ in changes])
    return plan, reference_of(plan, Inputs(base=base, adapters=changes))


@pytest.fixture
def right(tmp_path: Path) -> tuple[MergePlan, Reference]:
    """Two adapters, of which the second has two updates of the same weight."""
    changes = adapter({Q: low_rank(24, 24)}), adapter({Q: (low_rank(24, 24), low_rank(24, 24))})
    return planned(tmp_path, weights(), config(), *changes)


def edited(plan: MergePlan, name: str, change: Callable[[Edit], Edit | None]) -> MergePlan:
    (shard,) = plan.shards
    edits = [change(edit) if edit.tensor == name else edit for edit in shard.edits]
    return replace(plan, shards=(replace(shard, edits=tuple(edit for edit in edits if edit is not None)),))


def with_terms(plan: MergePlan, change: Callable[[tuple[Term, ...]], tuple[Term, ...]], name: str = Q) -> MergePlan:
    return edited(plan, name, lambda edit: replace(edit, terms=change(edit.terms)))


def with_tensors(plan: MergePlan, change: Callable[[PlannedTensor], list[PlannedTensor]]) -> MergePlan:
    (shard,) = plan.shards
    tensors = tuple(each for tensor in shard.tensors for each in change(tensor))
    return replace(plan, shards=(replace(shard, tensors=tensors),))


def test_a_plan_that_says_the_same_agrees(right: tuple[MergePlan, Reference]) -> None:
    assert check_plan(*right) == weights().keys()


FIRST, SECOND, THIRD = (
    f"update {index} of {Q} of adapter {number}, as it is, row 0 at 0, times 1"
    for number, index in ((1, 1), (2, 1), (2, 2))
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda terms: terms[:2], f"planned with no more updates, expected {THIRD}"),
        (lambda terms: terms[1:], f"planned with {SECOND}, expected {FIRST}"),
        (lambda terms: (*terms, terms[0]), f"planned with {FIRST}, expected no more updates"),
        (lambda terms: (terms[0], terms[2], terms[1]), f"planned with {THIRD}, expected {SECOND}"),
        (lambda _: (), f"planned with no more updates, expected {FIRST}"),
        *(
            (
                lambda terms, changed=changed: (terms[0], replace(terms[1], **changed), terms[2]),
                f"planned with {SECOND.replace(old, new)}, expected {SECOND}",
            )
            for changed, old, new in (
                ({"adapter": 0}, "adapter 2", "adapter 1"),
                ({"index": 1}, "update 1", "update 2"),
                ({"weight": K}, Q, K),
                ({"transposed": True}, "as it is", "transposed"),
                ({"strength": -0.5}, "times 1", "times -0.5"),
                ({"part": RowMap(expert=1)}, "row 0 at", "row 0 of expert 1 at"),
                ({"part": RowMap(expert=0)}, "row 0 at", "row 0 of expert 0 at"),
                ({"part": RowMap(rows=(2, 24))}, "row 0 at", "row 2 at"),
                ({"part": RowMap(at=3)}, "at 0", "at 3"),
            )
        ),
    ],
)
def test_another_update_is_named_with_the_right_one(
    right: tuple[MergePlan, Reference], change: Callable[[tuple[Term, ...]], tuple[Term, ...]], message: str
) -> None:
    with pytest.raises(MergeError) as error:
        check_plan(with_terms(right[0], change), right[1])
    assert f"{Q}: {message} (this is a bug in loraformat" in str(error.value)


@pytest.mark.parametrize("rows", [(0, 23), (0, 25), (0, 0)])
def test_another_number_of_rows_is_named(right: tuple[MergePlan, Reference], rows: tuple[int, int]) -> None:
    def shorter(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return (*terms[:2], replace(terms[2], part=RowMap(rows=rows)))

    check_plan(with_terms(right[0], lambda terms: (replace(terms[0], part=RowMap(rows=(0, 24))), *terms[1:])), right[1])
    with pytest.raises(MergeError, match=f"planned with {rows[1]} rows, expected 24"):
        check_plan(with_terms(right[0], shorter), right[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: [] if one.name == K else [one], f"{K}: the output lacks this tensor"),
        (lambda one: [one, replace(one, name="new")] if one.name == K else [one], "new: the output must not have this"),
        (
            lambda one: [replace(one, dtype="F16") if one.name == K else one],
            f"{K}: planned as ('F16', (24, 24)), expected ('F32', (24, 24))",
        ),
        (
            lambda one: [replace(one, shape=(24, 25)) if one.name == K else one],
            f"{K}: planned as ('F32', (24, 25)), expected ('F32', (24, 24))",
        ),
    ],
)
def test_another_tensor_is_named(
    right: tuple[MergePlan, Reference], change: Callable[[PlannedTensor], list[PlannedTensor]], message: str
) -> None:
    with pytest.raises(MergeError) as error:
        check_plan(with_tensors(right[0], change), right[1])
    assert message in str(error.value)


def test_a_copy_that_must_change_and_a_change_that_must_be_a_copy_are_named(right: tuple[MergePlan, Reference]) -> None:
    plan, wanted = right
    with pytest.raises(MergeError, match=rf"{Q}: planned as a copy, expected a change"):
        check_plan(edited(plan, Q, lambda _: None), wanted)
    (shard,) = plan.shards
    more = replace(shard, edits=(*shard.edits, replace(shard.edits[0], tensor=K, source=K)))
    with pytest.raises(MergeError, match=rf"{K}: planned as a change, expected a copy"):
        check_plan(replace(plan, shards=(more,)), wanted)


def test_rows_that_are_counted_along_other_axes_are_named(tmp_path: Path) -> None:
    up, down = LazyTensor.of(torch.ones(3, 8, 2)), LazyTensor.of(torch.ones(3, 2, 6))
    plan, wanted = planned(tmp_path, {"e": torch.ones(3, 8, 6)}, {}, adapter({"e": LowRank(up, down, 1.0)}))
    assert check_plan(plan, wanted) == {"e"}
    with pytest.raises(MergeError, match="e: its rows span 1 axes, expected 2"):
        check_plan(edited(plan, "e", lambda edit: replace(edit, row_axes=1)), wanted)


def test_the_rows_of_each_part_are_compared(tmp_path: Path) -> None:
    tensors = {f"{DISK}.{n}.{name}.weight": torch.ones(8, 6) for n in range(2) for name in ("w1", "w3")}
    up, down = LazyTensor.of(torch.ones(2, 16, 2)), LazyTensor.of(torch.ones(2, 2, 6))
    change = adapter({f"{MEMORY}.gate_up_proj": LowRank(up, down, 1.0)})
    plan, wanted = planned(tmp_path, tensors, MIXTRAL, change)
    assert check_plan(plan, wanted) == tensors.keys()
    name = f"{DISK}.1.w3.weight"
    for rows, message in {
        (8, 15): "planned with 7 rows, expected 8",
        (7, 15): "row 7 of expert 1 at 0, times 1, expected .* row 8 of expert 1 at 0",
    }.items():

        def cut(terms: tuple[Term, ...], rows: tuple[int, int] = rows) -> tuple[Term, ...]:
            return tuple(replace(term, part=replace(term.part, rows=rows)) for term in terms)

        with pytest.raises(MergeError, match=message):
            check_plan(with_terms(plan, cut, name), wanted)


def test_names_of_one_storage_are_compared_each(tmp_path: Path) -> None:
    tensors = weights(tied=True)
    folder = tmp_path / "base"
    save_base(folder, tensors, config(tied=True))
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, HEAD: tensors[EMBED]}, folder / "pytorch_model.bin")
    base = open_checkpoint(str(folder))
    change = adapter({Q: low_rank(24, 24)})
    plan = plan_merge(base, [change], [AdapterSource("memory", "none")])
    wanted = reference_of(plan, Inputs(base=base, adapters=[change]))
    assert plan.shards[0].aliases in ({HEAD: EMBED}, {EMBED: HEAD})
    assert check_plan(plan, wanted) == {*tensors, HEAD}
    (alias,) = plan.shards[0].aliases
    without: ShardPlan = replace(plan.shards[0], aliases={})
    with pytest.raises(MergeError, match=f"{alias}: the output lacks this tensor"):
        check_plan(replace(plan, shards=(without,)), wanted)
    wrong: ShardPlan = replace(plan.shards[0], aliases={alias: Q})
    with pytest.raises(MergeError, match=f"{alias}: planned as"):
        check_plan(replace(plan, shards=(wrong,)), wanted)


def test_what_an_adapter_does_that_is_not_followed_is_left_out(right: tuple[MergePlan, Reference]) -> None:
    plan, wanted = right
    lost: Any = replace(wanted, unfollowed={1: "why"})
    assert check_plan(plan, lost) == weights().keys() - {Q}
    unknown = with_tensors(plan, lambda one: [one, replace(one, name="new")] if one.name == K else [one])
    assert check_plan(unknown, lost) == weights().keys() - {Q}
    missing = with_tensors(plan, lambda one: [] if one.name == K else [one])
    with pytest.raises(MergeError, match=f"{K}: the output lacks this tensor"):
        check_plan(missing, lost)
