"""Whole merges of updates that are computed from the base: against float64, in any window, by any number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, contents, load, low_rank, merge, save_base, weights
from oracle import merged

from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError, NonFiniteValue, ShapeMismatch, UnmatchedUpdate, UnsupportedUpdate
from loraformat.merger import AdapterSource, plan_merge
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import (
    BiasFromWeight,
    BlockAffine,
    Dense,
    ElementwiseScale,
    FRoD,
    Scaled,
    SubtractedInit,
    Update,
    WeightNetwork,
)

Q, UP, DOWN = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight", "model.layers.0.down_proj.weight"
BIAS = "model.layers.1.up_proj.bias"


def lazy(*shape: int, seed: int = 3, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LazyTensor:
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return LazyTensor.of(value.to(dtype))


def network(rows: int, rank: int = 5) -> WeightNetwork:
    layers = [tuple(lazy(rank, rank, seed=seed + step) for seed in (0, 1, 2)) for step in (7, 20)]
    return WeightNetwork(lazy(rows, rank), lazy(rank, rows, seed=4, scale=0.1), 0.7, "tanh", *layers)


def recoded(cols: int, dtype: torch.dtype = torch.float32) -> FRoD:
    return FRoD(lazy(cols, cols, dtype=dtype), lazy(cols, cols, seed=9))


KINDS: dict[str, dict[str, tuple[Update, ...]]] = {
    "tiled": {
        Q: (BlockAffine(lazy(4, 6, 6)),),
        UP: (BlockAffine(lazy(65, 2, 2)), low_rank(130, 24)),
        DOWN: (BlockAffine(lazy(12, 2, 2)),),
    },
    "projected": {
        UP: (low_rank(130, 24), WeightNetwork(lazy(130, 3), lazy(3, 130, seed=4), -0.1)),
        DOWN: (WeightNetwork(lazy(24, 3), lazy(3, 24, seed=4), 0.1), network(24)),
    },
    "network": {Q: (network(24),), UP: (network(130), network(130, 2))},
    "recoded": {Q: (recoded(24),), UP: (recoded(24), low_rank(130, 24)), DOWN: (recoded(130),)},
    "recoded-bfloat16": {UP: (recoded(24, torch.bfloat16), recoded(24))},
    "carried": {
        UP: (ElementwiseScale(lazy(130, 2), lazy(2, 24)), low_rank(130, 24)),
        BIAS: (
            Scaled(lazy(130), is_bias=True, is_sum=True),
            Dense(lazy(130, seed=5)),
            BiasFromWeight(UP, lazy(24, seed=6), 130),
        ),
    },
}


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return weights(dtype=dtype) | {BIAS: torch.randn(130, generator=torch.Generator().manual_seed(8)).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_from_the_base_agrees_with_float64(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = base_weights(dtype)
    result = load(merge(save_base(tmp_path / "base", tensors, config()), tmp_path / "out", adapter(KINDS[kind])))
    for name, chain in KINDS[kind].items():
        exact = merged(tensors[name], list(chain), others=tensors)
        # Half a unit in the last place, and what sums of 130 products lose in float64; matrices of 130 are inverted.
        room = torch.finfo(dtype).eps / 2 * exact.abs() + (1e-6 if "recoded" in kind else 1e-11)
        assert ((result[name].double() - exact).abs() <= room).all()


@pytest.mark.parametrize("kind", KINDS)
def test_neither_memory_nor_threads_change_a_byte_of_it(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", base_weights(), config(), shards=2)
    one = contents(merge(base, tmp_path / "one", adapter(KINDS[kind])))
    for jobs, nbytes in ((1, 1), (3, 1), (3, 1 << 20)):
        assert (
            contents(merge(base, tmp_path / f"{jobs}-{nbytes}", adapter(KINDS[kind]), jobs=jobs, memory_nbytes=nbytes))
            == one
        )


@pytest.mark.parametrize(
    "update", [BlockAffine(lazy(12, 6, 6)), WeightNetwork(lazy(72, 3), lazy(3, 72), 0.5), network(72), recoded(24)]
)
def test_transposed_storage_gives_the_transpose(tmp_path: Path, update: Update) -> None:
    name = "h.0.attn.c_attn.weight"
    tensors = {name: torch.randn(24, 72, generator=torch.Generator().manual_seed(0))}
    base = save_base(tmp_path / "base", tensors, {"model_type": "gpt2"})
    result = load(merge(base, tmp_path / "out", adapter({name: update}), memory_nbytes=1))
    assert torch.allclose(result[name].double(), merged(tensors[name], [update], transposed=True), atol=1e-5)


def test_a_bias_is_computed_from_a_transposed_weight(tmp_path: Path) -> None:
    name, bias = "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"
    tensors = {name: torch.randn(24, 72), bias: torch.randn(72)}
    base = save_base(tmp_path / "base", tensors, {"model_type": "gpt2"})
    chains = {name: (low_rank(72, 24),), bias: (BiasFromWeight(name, lazy(24), 72),)}
    result = load(merge(base, tmp_path / "out", adapter(chains)))
    assert torch.allclose(result[bias], tensors[bias] + lazy(24).torch() @ tensors[name], atol=1e-5)


def test_two_adapters_are_each_counted_from_the_unmerged_base(tmp_path: Path) -> None:
    tensors = base_weights()
    base = save_base(tmp_path / "base", tensors, config())
    kinds = ("projected", "carried", "recoded")
    adapters = [adapter(KINDS[kind]) for kind in kinds]
    result = load(merge(base, tmp_path / "out", *adapters))[UP].double()
    before = tensors[UP].double()
    changes = [merged(tensors[UP], list(KINDS[kind][UP])) - before for kind in kinds]
    assert torch.allclose(result, before + sum(changes), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "update"),
    [
        (Q, BlockAffine(lazy(5, 5, 5))),
        (DOWN, BlockAffine(lazy(4, 6, 6))),
        (Q, BlockAffine(lazy(4, 6, 5))),
        (Q, WeightNetwork(lazy(24, 3), lazy(3, 25), 1.0)),
        (Q, WeightNetwork(lazy(24, 3), lazy(2, 24), 1.0)),
        (Q, recoded(25)),
        (BIAS, BiasFromWeight(UP, lazy(24), 131)),
        (BIAS, BiasFromWeight(UP, lazy(25), 130)),
    ],
)
def test_what_does_not_fit_the_base_is_refused(tmp_path: Path, name: str, update: Update) -> None:
    base = save_base(tmp_path / "base", base_weights(), config())
    with pytest.raises(ShapeMismatch):
        merge(base, tmp_path / "out", adapter({UP: low_rank(130, 24), name: update}))


def test_a_bias_from_a_weight_that_is_not_there_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", base_weights(), config())
    with pytest.raises(UnmatchedUpdate, match="the base does not have it"):
        merge(base, tmp_path / "out", adapter({BIAS: BiasFromWeight("model.other.weight", lazy(24), 130)}))


@pytest.mark.parametrize("update", [recoded(1), BiasFromWeight("m.weight", lazy(3), 1)])
def test_a_tensor_without_axes_is_no_weight_of_it(update: FRoD | BiasFromWeight) -> None:
    assert not update.fits(())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "carried"])
def test_what_comes_from_the_base_has_no_strength(tmp_path: Path, kind: str) -> None:
    base = open_checkpoint(str(save_base(tmp_path / "base", base_weights(), config())))
    with pytest.raises(UnsupportedUpdate, match=r"cannot be merged at a strength of 0\.5"):
        plan_merge(base, [adapter(KINDS[kind])], [AdapterSource("a", "x", strength=0.5)])


def test_a_part_between_equal_singular_values_is_refused(tmp_path: Path) -> None:
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    values = torch.tensor([3.0] * 12 + [2.0] * 8 + [0.0] * 4, dtype=torch.float64)
    base = save_base(tmp_path / "base", {"q_proj.weight": turn * values @ turn.T}, {})
    for rank in (4, 12, 2):  # a border between values that differ, or all of which are zero
        merge(base, tmp_path / f"out{rank}", adapter({"q_proj.weight": SubtractedInit("osf", rank, None, (24, 24))}))
    with pytest.raises(MergeError, match="ambiguous"):
        merge(base, tmp_path / "out", adapter({"q_proj.weight": SubtractedInit("osf", 7, None, (24, 24))}))


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    "update",
    [SubtractedInit("pissa", 3, None, (72, 24)), SubtractedInit("osf", 3, None, (72, 24)), network(72), recoded(24)],
    ids=["pissa", "osf", "network", "recoded"],
)
def test_a_base_that_is_not_finite_is_named_as_what_it_is(
    tmp_path: Path, update: Update, is_transposed: bool, value: float
) -> None:
    stored = torch.randn(72, 24)
    stored[70, 3] = value
    name, kind = ("h.0.attn.c_attn.weight", "gpt2") if is_transposed else (Q, "llama")
    tensors = {name: stored.T.contiguous() if is_transposed else stored}
    base = save_base(tmp_path / "base", tensors, config() | {"model_type": kind})
    with pytest.raises(NonFiniteValue, match="the base weight, which holds NaN or infinity"):
        merge(base, tmp_path / "out", adapter({name: update}))


def test_a_bias_from_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = base_weights()
    tensors[UP][129, 0] = float("nan")
    base = save_base(tmp_path / "base", tensors, config())
    with pytest.raises(NonFiniteValue, match="the base weight, which holds NaN or infinity"):
        merge(base, tmp_path / "out", adapter({UP: low_rank(130, 24), BIAS: BiasFromWeight(UP, lazy(24), 130)}))
