"""Adapters in memory for tests of rules: factors without values."""

from __future__ import annotations

from typing import Any

import pytest

from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import Bundle
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank, Magnitude, Update
from loraformat.rules import Hit, Rule, Subject


def zeros(*shape: int, dtype: DType = DType.F32) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda start, stop: pytest.fail("values are not needed"))


def pair(
    out: int = 4,
    into: int = 4,
    rank: int = 2,
    *,
    scale: float | None = 1.0,
    dtypes: tuple[DType, DType] = (DType.F32, DType.F32),
    has_magnitude: bool = False,
) -> LowRank:
    magnitude = Magnitude(zeros(out)) if has_magnitude else None
    return LowRank(zeros(out, rank, dtype=dtypes[0]), zeros(rank, into, dtype=dtypes[1]), scale, magnitude)


def hits(rule: Rule, updates: dict[str, Update], format_name: str = "peft", **config: Any) -> list[Hit]:
    adapter = Adapter(config=AdapterConfig(**config), updates={name: (each,) for name, each in sorted(updates.items())})
    return list(rule.check(Subject(bundle=Bundle("", {}), format=format_name, adapter=adapter)))
