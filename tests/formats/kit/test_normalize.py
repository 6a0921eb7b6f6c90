"""One rank and one factor for all, other dtypes, and what comes back from writers that have only one of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bundles import bundle, loaded
from hypothesis import given, settings
from oracle import HARD, dense, rounded_exactly
from strategies import adapters, lazy, values
from torch import Tensor

from loraformat.diagnostics import Severity
from loraformat.errors import NonFiniteValue
from loraformat.formats import loralib, mlx, peft
from loraformat.formats.kit.base import Format, WriteOptions
from loraformat.formats.kit.normalize import cast, multiplied, stripped, uniform
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.bundle import RawFile
from loraformat.model.floats import ROUNDOFF
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace

FLOOR = {DType.F16: 2.0**-25}  # half the smallest number above zero


def of(**updates: LowRank) -> Adapter:
    named = {f"net.{name}.weight": (update,) for name, update in sorted(updates.items())}
    return Adapter(config=AdapterConfig(), updates=named)


def bound(update: LowRank) -> Tensor:
    """How far each value of the dense update may be off when every value of `up` is rounded once."""
    up, down = update.up.torch().double().abs(), update.down.torch().double().abs()
    error = up * ROUNDOFF[update.up.dtype] + FLOOR.get(update.up.dtype, 0.0)
    return 2 * abs(update.scale) * (error @ down).reshape(update.shape) + 1e-13 * (1 + dense(update).abs())


def assert_close(found: Adapter, wanted: Adapter) -> None:
    assert list(found.updates) == list(wanted.updates)
    for weight, chain in wanted.updates.items():
        for one, other in zip(found.updates[weight], chain, strict=True):
            assert type(one) is type(other)
            if isinstance(other, Replace):
                assert torch.equal(one.value.torch(), other.value.torch())
                continue
            assert bool(((dense(one) - dense(other)).abs() <= bound(other)).all()), weight
            assert one.is_embedding == other.is_embedding


def comes_back(adapter: Adapter, each: Format) -> None:
    errors = [found for found in each.losses(adapter) if found.severity is Severity.ERROR]
    if errors:
        assert {found.code for found in errors} == {"LF702"}
        return
    for container in each.CONTAINERS:
        try:
            written = bundle(loaded(each.write(adapter, WriteOptions(container=container))))
        except NonFiniteValue:  # a folded factor can leave float16, and then nothing is written
            assert any(t.dtype is DType.F16 for chain in adapter.updates.values() for u in chain for t in [u.up])
            return
        again = each.read(written)
        assert_close(again, adapter)
        assert not again.unclaimed


@given(adapters(kinds={"embedding"}, with_layer=True))
@settings(max_examples=60)
def test_what_mlx_holds_comes_back(adapter: Adapter) -> None:
    comes_back(adapter, mlx)


@given(adapters(kinds={"embedding", "conv", "table", "bias"}, with_layer=True))
@settings(max_examples=60)
def test_what_loralib_holds_comes_back(adapter: Adapter) -> None:
    comes_back(adapter, loralib)


@given(adapters(kinds={"linear", "embedding", "conv"}, with_layer=True))
@settings(max_examples=60)
def test_a_plain_adapter_has_one_rank_and_one_scale(adapter: Adapter) -> None:
    even, findings = uniform(adapter)
    low_ranks = [update for chain in even.updates.values() for update in chain if isinstance(update, LowRank)]
    assert len({update.scale for update in low_ranks}) == len({update.rank for update in low_ranks}) == 1
    kept = {w: tuple(u for u in chain if isinstance(u, LowRank)) for w, chain in adapter.updates.items()}
    kept = {weight: chain for weight, chain in kept.items() if chain}
    try:
        assert_close(replace(even, updates={w: even.updates[w][-1:] for w in kept}), replace(adapter, updates=kept))
    except NonFiniteValue:
        assert any(update.up.dtype is DType.F16 for update in low_ranks)
    assert {found.code for found in findings} <= {"LF701", "LF707"}


@given(adapters(kinds={"linear", "embedding", "conv", "rows", "table", "difference"}, with_layer=True))
@settings(max_examples=60)
def test_what_an_old_peft_is_given_comes_back(adapter: Adapter) -> None:
    for version in ((0, 5), (0, 9), (0, 14), (0, 21)):
        options = WriteOptions(peft_version=version)
        if any(found.severity is Severity.ERROR for found in peft.losses(adapter, options)):
            continue
        written = peft.write(adapter, options)
        again = peft.read(bundle(loaded(written)))
        assert list(again.updates) == list(adapter.updates)
        for weight, chain in adapter.updates.items():
            if isinstance(chain[-1], LowRank):
                assert bool(((dense(again.updates[weight][-1]) - dense(chain[-1])).abs() <= bound(chain[-1])).all())


def test_a_power_of_two_is_folded_exactly() -> None:
    first, second, third = (LowRank(lazy(5, 2, seed=n), lazy(2, 3), 0.5) for n in range(3))
    even, findings = uniform(of(a=first, b=second, c=replace(third, scale=2.0)))
    assert [(found.code, "exact" in found.message) for found in findings] == [("LF701", True)]
    assert torch.equal(even.updates["net.c.weight"][0].up.torch(), 4 * third.up.torch())
    assert even.updates["net.c.weight"][0].scale == 0.5


def test_the_bias_of_a_folded_layer_is_folded_with_it() -> None:
    layers = of(a=LowRank(lazy(5, 2), lazy(2, 3), 0.5), b=LowRank(lazy(5, 2), lazy(2, 3), 0.5))
    third = {"net.c.weight": (LowRank(lazy(5, 2), lazy(2, 3), 3.0),), "net.c.bias": (Dense(lazy(5), 3.0),)}
    adapter = replace(layers, updates={**layers.updates, **third})
    even, _ = uniform(adapter)
    assert even.updates["net.c.bias"][0].scale == 0.5
    torch.testing.assert_close(dense(even.updates["net.c.bias"][0]), 3 * lazy(5).torch().double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor", [3.0000000001, 1 / 3, -0.7])
def test_a_factor_is_worked_in_with_one_rounding(dtype: torch.dtype, factor: float) -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = multiplied(LazyTensor.of(values), factor).torch()
    wanted = [rounded_exactly(value * factor, dtype) for value in values.double().tolist()]
    assert (found.dtype, found.tolist()) == (dtype, wanted)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_another_dtype_is_reached_with_one_rounding(dtype: DType) -> None:
    hard = np.array([value for value in HARD if abs(value) < 60000])
    adapter = of(a=LowRank(LazyTensor.of(hard[:, None]), LazyTensor.of(np.ones((1, 2))), 1.0))
    found, _ = cast(adapter, dtype)
    up = found.updates["net.a.weight"][0].up
    assert up.dtype is dtype
    assert up.load()[:, 0].tolist() == [rounded_exactly(value, dtype.torch) for value in hard.tolist()]


def test_padding_adds_zeros_and_reads_any_rows() -> None:
    short, long = LowRank(lazy(6, 1), lazy(1, 3), 1.0), LowRank(lazy(6, 4), lazy(4, 3), 1.0)
    even, findings = uniform(of(a=short, b=long))
    (update,) = even.updates["net.a.weight"]
    assert [found.code for found in findings] == ["LF707"]
    assert (update.up.shape, update.down.shape) == ((6, 4), (4, 3))
    whole = update.down.torch()
    assert [update.down.read(n, m).tolist() for n in range(5) for m in range(n, 5)] == [
        whole[n:m].tolist() for n in range(5) for m in range(n, 5)
    ]
    assert np.array_equal(update.up.read(2, 5), update.up.load()[2:5])
    assert torch.equal(dense(update), dense(short))


def test_updates_that_alpha_turned_off_stay_so() -> None:
    off, on = LowRank(lazy(5, 1), lazy(1, 3), 0.0), LowRank(lazy(5, 2), lazy(2, 3), 1.5)
    even, _ = uniform(of(a=off, b=on))
    assert not dense(even.updates["net.a.weight"][0]).any()
    all_off, findings = uniform(of(a=off, b=replace(on, scale=0.0)))
    assert {chain[0].rank for chain in all_off.updates.values()} == {2}
    assert [found.code for found in findings] == ["LF707"]


def test_a_magnitude_is_neither_folded_nor_padded() -> None:
    dora = LowRank(lazy(5, 2), lazy(2, 3), 3.0, Magnitude(lazy(5, seed=4)))
    even, _ = uniform(of(a=dora, b=LowRank(lazy(5, 3), lazy(3, 3), 1.0), c=LowRank(lazy(5, 3), lazy(3, 3), 1.0)))
    assert torch.equal(even.updates["net.a.weight"][0].magnitude.vector.torch(), lazy(5, seed=4).torch())


@pytest.mark.parametrize(
    ("source", "target", "loses"),
    [
        (torch.float32, DType.BF16, True),
        (torch.bfloat16, DType.F32, False),
        (torch.float16, DType.BF16, True),
        (torch.float16, DType.F32, False),
        (torch.float64, DType.F32, True),
        (torch.bfloat16, DType.BF16, False),
    ],
)
def test_another_dtype_rounds_once_and_says_so(source: torch.dtype, target: DType, *, loses: bool) -> None:
    values_before = values(5, 2, dtype=source)
    adapter = of(a=LowRank(LazyTensor.of(values_before), lazy(2, 3, dtype=source), 1.0))
    narrow, findings = cast(adapter, target)
    (update,) = narrow.updates["net.a.weight"]
    assert torch.equal(update.up.torch(), values_before.to(target.torch))
    assert [found.code for found in findings] == (["LF704"] if loses else [])


def test_a_value_beyond_the_dtype_is_refused() -> None:
    huge = LazyTensor.of(torch.full((5, 2), 1e5))
    narrow, _ = cast(of(a=LowRank(huge, lazy(2, 3), 1.0)), DType.F16)
    with pytest.raises(NonFiniteValue, match="too large for float16"):
        narrow.updates["net.a.weight"][0].up.torch()


def test_stripping_leaves_what_loaders_need() -> None:
    raw = {"peft_type": "LORA", "lora_alpha": 16, "r": 2, "lora_dropout": 0.1, "eva_config": {"rho": 2}}
    config = AdapterConfig(base_model="/home/me/models/llama", base_revision="main", raw=raw)
    readme = RawFile("README.md", 2, lambda: b"hi")
    adapter = replace(of(a=LowRank(lazy(5, 2), lazy(2, 3), 8.0)), config=config, other_files={"README.md": readme})
    bare, losses = stripped(adapter)
    written = loaded(peft.write(bare))
    assert sorted(written) == ["adapter_config.json", "adapter_model.safetensors"]
    found = written["adapter_config.json"]
    assert (found["lora_alpha"], found["r"], found["base_model_name_or_path"]) == (16, 2, None)
    assert "eva_config" not in found
    assert [loss.code for loss in losses] == ["LF703"]
    hub = replace(adapter, config=replace(config, base_model="meta-llama/Llama-3.1-8B"))
    assert stripped(hub)[0].config.base_model == "meta-llama/Llama-3.1-8B"
