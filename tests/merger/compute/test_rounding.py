"""Output dtypes and rounding by chance: right values, right headers, the same bytes whatever the windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merger.checkpoints import adapter, config, contents, load, low_rank, merge_and_tell, save_base, weights
from oracle import HARD, merged, rounded_exactly

from loraformat.errors import NonFiniteValue
from loraformat.merger.compute.retention import total_share
from loraformat.merger.compute.rounding import Chance, nearest_bits, values_of
from loraformat.merger.plan.data import Arithmetic
from loraformat.model.tensors import DType, LazyTensor
from loraformat.model.updates import LowRank

Q, UP = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight"
CHANCE = Arithmetic(rounding="stochastic", seed=7)


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_every_floating_tensor_is_written_in_the_dtype(tmp_path: Path, dtype: DType, container: str) -> None:
    tensors = weights(dtype=torch.bfloat16) | {"ids": torch.arange(5), "flag": torch.ones((), dtype=torch.bool)}
    settings = config(dtype="bfloat16", text_config={"torch_dtype": "bfloat16"})
    base = save_base(tmp_path / "base", tensors, settings, shards=2)
    updates = {Q: low_rank(24, 24), UP: low_rank(130, 24)}
    merge_and_tell(base, tmp_path / "out", adapter(updates), dtype=dtype, container=container)
    result = load(tmp_path / "out")
    assert result.keys() == tensors.keys()
    for name, weight in tensors.items():
        if not weight.is_floating_point():
            assert torch.equal(result[name], weight)
            continue
        exact = merged(weight, [updates[name]] if name in updates else [])
        room = torch.finfo(dtype.torch).eps / 2 * exact.abs() + 1e-5
        assert result[name].dtype == dtype.torch
        assert ((result[name].double() - exact).abs() <= room).all()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["dtype"], said["text_config"]["torch_dtype"]) == (dtype.torch_name, dtype.torch_name)
    index = next((tmp_path / "out").glob("*.index.json"))
    total = sum(value.nbytes for value in result.values())
    assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_a_base_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    tensors[UP][3, 4] = 1e6
    base = save_base(tmp_path / "base", tensors, config())
    with pytest.raises(NonFiniteValue, match="row 3, column 4"):
        merge_and_tell(base, tmp_path / "out", adapter({Q: low_rank(24, 24)}), dtype=DType.F16)


def test_sums_are_those_of_float64(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.float32)
    base = save_base(tmp_path / "base", tensors, config())
    merge_and_tell(base, tmp_path / "out", adapter({Q: low_rank(24, 24)}))
    assert torch.equal(load(tmp_path / "out")[Q], merged(tensors[Q], [low_rank(24, 24)]).float())


def stochastic(
    values: torch.Tensor, dtype: torch.dtype, first: int = 0, seed: int = 7, name: str = "w"
) -> torch.Tensor:
    written = DType.by_torch_name(str(dtype).removeprefix("torch."))
    bits = Chance(seed, name).bits(values.double().numpy(), written, first)
    return torch.from_numpy(values_of(bits, written)).to(dtype)


@given(first=st.integers(0, 10_000), cut=st.integers(0, 300), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_number_drawn_depends_on_the_place_alone(first: int, cut: int, dtype: torch.dtype) -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(first))
    whole = stochastic(values, dtype, first)
    parts = torch.cat([stochastic(values[:cut], dtype, first), stochastic(values[cut:], dtype, first + cut)])
    assert torch.equal(whole, parts)


@given(
    exponent=st.integers(-30, 10), seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.bfloat16, torch.float16])
)
def test_the_result_is_one_of_the_two_neighbours(exponent: int, seed: int, dtype: torch.dtype) -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rounded, nearest = stochastic(values, dtype), values.to(dtype)
    other = torch.where(
        nearest.double() > values.double(),
        torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)),
        torch.nextafter(nearest, torch.full_like(nearest, torch.inf)),
    )
    exact = nearest.double() == values.double()
    assert bool(((rounded == nearest) | ((rounded == other) & ~exact)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_the_value(dtype: torch.dtype) -> None:
    for value in (1.001, -1.0003, 3e-6, -0.3):
        mean = stochastic(torch.full((200_000,), value), dtype).double().mean().item()
        # The standard deviation of one draw is at most half of the distance between neighbours.
        step = max(torch.finfo(dtype).eps * abs(value), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert abs(mean - torch.tensor(value).item()) < 5 * step / 2 / 200_000**0.5


def test_seed_and_name_change_the_draw_and_equal_ones_repeat_it() -> None:
    values = torch.full((1000,), 1.002)
    first = stochastic(values, torch.bfloat16)
    assert torch.equal(stochastic(values, torch.bfloat16), first)
    assert not torch.equal(stochastic(values, torch.bfloat16, seed=8), first)
    assert not torch.equal(stochastic(values, torch.bfloat16, name="v"), first)


def test_neither_threads_nor_memory_change_a_byte_of_chance(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)
    change = adapter({Q: low_rank(24, 24), UP: low_rank(130, 24)})
    merge_and_tell(base, tmp_path / "a", change, arithmetic=CHANCE)
    for number, (jobs, memory) in enumerate([(1, 1), (4, 1), (2, 1 << 30)]):
        out = tmp_path / f"b{number}"
        merge_and_tell(base, out, change, jobs=jobs, memory_nbytes=memory, arithmetic=CHANCE)
        assert contents(out) == contents(tmp_path / "a")


def test_chance_keeps_an_update_that_the_nearest_value_loses(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {Q: torch.ones(640, 256, dtype=torch.bfloat16)}, config())
    # A tenth of the distance between 1 and its neighbour.
    small = LowRank(LazyTensor.of(torch.full((640, 1), 2**-7 / 10)), LazyTensor.of(torch.ones(1, 256)), 1.0)
    nearest = merge_and_tell(base, tmp_path / "a", adapter({Q: small}))
    chance = merge_and_tell(base, tmp_path / "b", adapter({Q: small}), arithmetic=CHANCE)
    assert total_share(nearest.tallies) == 0
    assert total_share(chance.tallies) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_once(dtype: torch.dtype) -> None:
    values = torch.tensor([sign * value for value in HARD for sign in (1, -1)], dtype=torch.float64)
    written = DType.by_torch_name(str(dtype).removeprefix("torch."))
    found = torch.from_numpy(values_of(nearest_bits(values.numpy(), written), written))
    wanted = torch.tensor([rounded_exactly(float(value), dtype) for value in values], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
