"""Every kind of update, in blocks, against the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import merged

from loraformat.arithmetic import TILE
from loraformat.errors import MergeError, NonFiniteValue
from loraformat.merger.compute.apply import add_column_squares, apply, common_unit
from loraformat.merger.compute.kinds.arithmetic import prepare
from loraformat.merger.compute.kinds.placement import Placement
from loraformat.merger.compute.kinds.steps import Addition
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    BlockAffine,
    Dense,
    ElementwiseScale,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Multiplied,
    Replace,
    Rotated,
    Rows,
    Scaled,
    Update,
    kind_of,
)


def lazy(generator: torch.Generator, *shape: int) -> LazyTensor:
    return LazyTensor.of(torch.randn(*shape, generator=generator))


def make_factor(kind: str, rows: int, cols: int, rank: int, g: torch.Generator) -> Update:
    """A kind that multiplies."""
    match kind:
        case "scaled":
            return Scaled(lazy(g, rows), lazy(g, cols))
        case "left" | "right" | "left-ordered" | "right-ordered":
            side, _, is_ordered = kind.partition("-")
            length = rows if side == "left" else cols
            order = tuple(torch.randperm(length, generator=g).tolist()) if is_ordered else None
            return Rotated(lazy(g, length // 2, 2, 2), side, order=order)
        case "left-shared" | "right-shared":
            return Rotated(lazy(g, 1, 2, 2), kind.partition("-")[0], is_shared=True)
        case "left-whole":
            return Rotated(LazyTensor.of(torch.randn(1, rows, rows, generator=g) / rows**0.5), "left")
        case "multiplied":
            return Multiplied(lazy(g, cols, rank), lazy(g, rank, cols))
        case "modulated":
            return ElementwiseScale(lazy(g, rows, rank), lazy(g, rank, cols))
        case "scaled-sum":
            return Scaled(lazy(g, rows), lazy(g, cols), is_sum=True)
        case "tiled":
            return BlockAffine(lazy(g, rows // 2, 2, 2))
    raise ValueError(kind)


def make(kind: str, rows: int, cols: int, rank: int, seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    match kind:
        case "low-rank":
            return LowRank(lazy(g, rows, rank), lazy(g, rank, cols), 0.5)
        case "dora":
            vector = LazyTensor.of(torch.rand(rows, generator=g) + 0.5)
            return LowRank(lazy(g, rows, rank), lazy(g, rank, cols), 2.0, Magnitude(vector, 1))
        case "dora-columns":
            vector = LazyTensor.of(torch.rand(cols, generator=g) + 0.5)
            return LowRank(lazy(g, rows, rank), lazy(g, rank, cols), 2.0, Magnitude(vector, 0), is_embedding=True)
        case "hadamard":
            return Hadamard(lazy(g, rows, rank), lazy(g, rank, cols), lazy(g, rows, rank), lazy(g, rank, cols), 1.5)
        case "kronecker":
            return Kronecker((lazy(g, 2, 2),), (lazy(g, rows // 2, rank), lazy(g, rank, cols // 2)), 0.25)
        case "diff":
            return Dense(lazy(g, rows, cols), 1.0)
        case "replace":
            return Replace(lazy(g, rows, cols))
        case "rows":
            return Rows((rows - 1, 0), lazy(g, 2, cols))
        case _:
            return make_factor(kind, rows, cols, rank, g)


FACTORS = (
    *("scaled", "left", "right", "left-ordered", "right-ordered", "left-shared", "right-shared", "left-whole"),
    "multiplied",
    *("modulated", "scaled-sum", "tiled"),
)
KINDS = (*FACTORS, "low-rank", "dora", "dora-columns", "hadamard", "kronecker", "diff", "replace", "rows")


def run(weight: torch.Tensor, updates: list[Update], *, transposed: bool, step: int) -> torch.Tensor:
    """`weight` merged in windows of `step` rows, or more where updates need more together."""
    values = weight.double().numpy()
    steps = [prepare(u, Placement(transposed, tuple(weight.shape), "w")) for u in updates]
    norms = []
    units = [kind_of(u).row_unit(u, transposed, weight.shape[0]) for u in updates]
    unit = common_unit([TILE, *units], weight.shape[0])
    step = -(-step // unit) * unit
    starts = range(0, weight.shape[0], step)
    for each in steps:
        total = None
        if isinstance(each, Addition) and each.needs_column_norms:
            total = np.zeros((1, weight.shape[1]))
            for start in starts:
                add_column_squares(total, values[start : start + step].copy(), start, steps, each)
            total = np.sqrt(total)
        norms.append(total)
    return torch.from_numpy(np.concatenate([apply(values[s : s + step].copy(), s, steps, norms) for s in starts]))


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 150).map(lambda n: 2 * n),
    cols=st.integers(1, 40).map(lambda n: 2 * n),
    rank=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    transposed=st.booleans(),
)
def test_each_kind_agrees_with_float64(kind: str, rows: int, cols: int, rank: int, seed: int, transposed: bool) -> None:
    transposed = transposed and kind not in ("rows", "replace", "dora-columns")
    update = make(kind, rows, cols, rank, seed)
    g = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn((cols, rows) if transposed else (rows, cols), generator=g)
    result = run(weight, [update], transposed=transposed, step=TILE)
    expected = merged(weight, [update], transposed=transposed)
    # float64 sums of at most 300 products of values of a few units
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-11)


@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 200).map(lambda n: 2 * n), tiles=st.integers(1, 4))
def test_the_window_does_not_change_a_bit(kind: str, rows: int, tiles: int) -> None:
    weight = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows))
    updates = [make(kind, rows, 24, 3, 7), make("low-rank", rows, 24, 5, 8)]
    whole = run(weight, updates, transposed=False, step=(rows // TILE + 1) * TILE)
    assert torch.equal(run(weight, updates, transposed=False, step=tiles * TILE), whole)


def test_several_terms_are_summed_with_norms_of_the_unmerged_weight() -> None:
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(0))
    updates = [make("low-rank", 70, 30, 4, 1), make("dora", 70, 30, 4, 2), make("diff", 70, 30, 4, 3)]
    result = run(weight, updates, transposed=False, step=TILE)
    assert torch.allclose(result, merged(weight, updates), rtol=1e-12, atol=1e-12)


def test_what_changes_as_a_sum_is_counted_from_the_unmerged_weight() -> None:
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(0))
    updates = [make(kind, 70, 30, 4, seed) for seed, kind in enumerate(("low-rank", "modulated", "scaled-sum"))]
    result = run(weight, updates, transposed=False, step=TILE)
    each = sum(merged(weight, [update]) - weight.double() for update in updates)
    assert torch.allclose(result, weight + each, rtol=1e-12, atol=1e-12)
    assert torch.allclose(result, merged(weight, updates), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused(value: float) -> None:
    up = torch.zeros(4, 2)
    up[1, 1] = value
    update = LowRank(LazyTensor.of(up), LazyTensor.of(torch.zeros(2, 4)), 1.0)
    with pytest.raises(NonFiniteValue, match="NaN or infinity"):
        prepare(update, Placement(transposed=False, shape=(4, 4), where="q_proj.weight"))


def test_an_unknown_scale_is_refused() -> None:
    update = LowRank(LazyTensor.of(torch.zeros(4, 2)), LazyTensor.of(torch.zeros(2, 4)), None)
    with pytest.raises(MergeError, match="alpha"):
        prepare(update, Placement(transposed=False, shape=(4, 4), where="q_proj.weight"))


@given(rows=st.integers(1, 60).map(lambda n: 6 * n), blocks=st.integers(1, 3), transposed=st.booleans())
def test_blocks_that_mix_rows_stand_together_in_every_window(rows: int, blocks: int, transposed: bool) -> None:
    """A block of 6 rows against tiles of 64: windows are whole numbers of both."""
    g = torch.Generator().manual_seed(rows)
    side = "right" if transposed else "left"
    updates = [
        make("low-rank", 10, rows, 2, 1) if transposed else make("low-rank", rows, 10, 2, 1),
        Rotated(lazy(g, rows // 6, 6, 6), side),
        Scaled(lazy(g, 10 if transposed else rows)),
    ]
    weight = torch.randn(rows, 10, generator=g)
    unit = common_unit([TILE, 6], rows)
    whole = run(weight, updates, transposed=transposed, step=10_000 * unit)
    assert torch.equal(run(weight, updates, transposed=transposed, step=blocks * unit), whole)
    assert torch.allclose(whole, merged(weight, updates, transposed=transposed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_that_multiplies_is_finite_too(kind: str) -> None:
    update = make(kind, 4, 4, 2, 0)
    bad = LazyTensor.of(torch.full((4, 4, 4), float("nan")))
    for name in ("rows", "blocks", "up"):
        if hasattr(update, name):
            shape = getattr(update, name).shape
            broken = replace(update, **{name: LazyTensor.of(bad.torch().flatten()[: math.prod(shape)].reshape(shape))})
            with pytest.raises(NonFiniteValue, match="NaN or infinity"):
                prepare(broken, Placement(transposed=False, shape=(4, 4), where="w"))
