"""Updates that are alike: every update in one group, and nothing in a group that a header would tell apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Magnitude, Replace, Update

USUAL = LowRank(LazyTensor.of(torch.ones(6, 2)), LazyTensor.of(torch.ones(2, 4)), 2.0)
OTHERS: dict[str, LowRank] = {
    "out": replace(USUAL, up=LazyTensor.of(torch.ones(8, 2))),
    "in": replace(USUAL, down=LazyTensor.of(torch.ones(2, 8))),
    "dtype of up": replace(USUAL, up=LazyTensor.of(torch.ones(6, 2).half())),
    "dtype of down": replace(USUAL, down=LazyTensor.of(torch.ones(2, 4).half())),
    "scale": replace(USUAL, scale=1.0),
    "no scale": replace(USUAL, scale=None),
    "magnitude": replace(USUAL, magnitude=Magnitude(LazyTensor.of(torch.ones(6)))),
    "kernel": replace(USUAL, kernel=(2, 2)),
    "embedding": replace(USUAL, is_embedding=True),
}


def adapter(updates: dict[str, tuple[Update, ...]], **ranks: int) -> Adapter:
    return Adapter(config=AdapterConfig(declared_ranks=ranks), updates=updates)


def test_updates_that_differ_in_values_alone_are_one_group() -> None:
    other = replace(USUAL, up=LazyTensor.of(torch.zeros(6, 2)))
    (group,) = adapter({"a": (USUAL,), "b": (other, USUAL), "c": (USUAL,)}).update_groups
    assert group.weights == ["a", "b", "b", "c"]


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_differs_parts_them(name: str) -> None:
    groups = adapter({"a": (USUAL,), "b": (OTHERS[name],), "c": (USUAL,)}).update_groups
    assert [(group.update, group.weights) for group in groups] == [(USUAL, ["a", "c"]), (OTHERS[name], ["b"])]


def test_the_declared_rank_parts_them() -> None:
    groups = adapter({"a": (USUAL,), "b": (USUAL,), "c": (USUAL,)}, a=2, b=4).update_groups
    assert [(group.declared_rank, group.weights) for group in groups] == [(2, ["a"]), (4, ["b"]), (None, ["c"])]


def test_every_update_is_in_one_group() -> None:
    updates: dict[str, tuple[Update, ...]] = {
        f"{number}.{name}": (Replace(LazyTensor.of(torch.ones(1))), update, USUAL)
        for number in range(3)
        for name, update in OTHERS.items()
    }
    counts = Counter(weight for group in adapter(updates).update_groups for weight in group.weights)
    assert counts == dict.fromkeys(updates, 3)
