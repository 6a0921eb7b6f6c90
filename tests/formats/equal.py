"""When two adapters say the same: the same updates in order, values equal bit for bit, factors to the last bit."""

from __future__ import annotations

import pytest
import torch

from loraformat.model.adapter import Adapter
from loraformat.model.updates import LowRank, Replace, Rows, Update, tensors

ONE_ULP = 3e-16  # a factor that is divided and multiplied by the rank again


def assert_same_updates(found: Adapter, wanted: Adapter) -> None:
    assert list(found.updates) == list(wanted.updates)
    for weight, updates in wanted.updates.items():
        assert [type(each) for each in found.updates[weight]] == [type(each) for each in updates], weight
        for one, other in zip(found.updates[weight], updates, strict=True):
            _assert_same(weight, one, other)


def _assert_same(weight: str, found: Update, wanted: Update) -> None:
    for (role, one), (other_role, other) in zip(tensors(found), tensors(wanted), strict=True):
        assert (role, one.shape, one.dtype) == (other_role, other.shape, other.dtype), weight
        assert torch.equal(one.torch(), other.torch()), (weight, role)
    scale = getattr(wanted, "scale", None)
    assert getattr(found, "scale", None) == (scale if scale is None else pytest.approx(scale, rel=ONE_ULP))
    if isinstance(wanted, LowRank):
        assert isinstance(found, LowRank)
        assert (found.kernel, found.is_embedding) == (wanted.kernel, wanted.is_embedding)
        assert (found.magnitude and found.magnitude.axis) == (wanted.magnitude and wanted.magnitude.axis)
    if isinstance(wanted, Rows):
        assert isinstance(found, Rows)
        assert (found.indices, found.follows_tie) == (wanted.indices, wanted.follows_tie)
    # A bias is tied to nothing.
    if isinstance(wanted, Replace) and not weight.endswith(".bias"):
        assert isinstance(found, Replace)
        assert found.follows_tie == wanted.follows_tie, weight
