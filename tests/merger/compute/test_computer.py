"""Windows of edited tensors: the same bytes from every loop, and what becomes of special values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from arithmetic.cases import LOOPS
from merger.checkpoints import adapter, config, contents, load, low_rank, merge_and_tell, save_base, weights
from oracle import merged

from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Replace, Rows, Update

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_gives_the_same_bytes_by_every_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", weights(dtype=dtype), config())
    updates = {"model.layers.0.q_proj.weight": low_rank(24, 24), "model.layers.1.up_proj.weight": low_rank(130, 24)}
    merges = {}
    for loop in LOOPS:
        monkeypatch.setenv("LORAFORMAT_LOOP", loop)
        merges[loop] = merge_and_tell(base, tmp_path / loop, adapter(updates))
        assert contents(tmp_path / loop) == contents(tmp_path / LOOPS[0])
    for name, tally in merges[LOOPS[0]].tallies.items():
        for other in (merge.tallies[name] for merge in merges.values()):
            assert (tally.unchanged, tally.numel) == (other.unchanged, other.numel)
            assert (tally.kept, tally.whole, tally.largest) == pytest.approx((other.kept, other.whole, other.largest))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_zero_update_keeps_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, loop: str
) -> None:
    """All patterns of 16 bits, -0 and every NaN among them."""
    monkeypatch.setenv("LORAFORMAT_LOOP", loop)
    name = "model.layers.0.q_proj.weight"
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128)
    base = save_base(tmp_path / "base", {name: patterns}, config())
    update = LowRank(LazyTensor.of(torch.zeros(512, 2)), LazyTensor.of(torch.ones(2, 128)), 1.0)
    merge_and_tell(base, tmp_path / "out", adapter({name: update}))
    assert contents(tmp_path / "out")["model.safetensors"] == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loop", LOOPS)
def test_values_that_are_not_finite_in_the_base_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    monkeypatch.setenv("LORAFORMAT_LOOP", loop)
    tensors, name = weights(dtype=torch.bfloat16), "model.layers.0.q_proj.weight"
    tensors[name][3, 4], tensors[name][5, 6] = float("nan"), float("-inf")
    base = save_base(tmp_path / "base", tensors, config())
    tally = merge_and_tell(base, tmp_path / "out", adapter({name: low_rank(24, 24)})).tallies[name]
    assert 0.9 < tally.kept / tally.whole < 1.1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rows", [130, 135, 100], ids=["as-long", "grown", "shrunk"])
def test_rows_are_computed_where_they_stand_in_windows_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, loop: str
) -> None:
    monkeypatch.setenv("LORAFORMAT_LOOP", loop)
    name, old = "w.weight", torch.randn(130, 24, generator=torch.Generator().manual_seed(1))
    base = save_base(tmp_path / "base", {name: old}, {})
    chains: list[list[Update]] = [[low_rank(rows, 24)]] if rows == 130 else []
    if rows > 130:
        added = LazyTensor.of(torch.ones(rows - 129, 24))
        chains.append([Rows((0, *range(130, rows)), added)])
    chains.append([Replace(LazyTensor.of(torch.ones(rows, 24))), low_rank(rows, 24)])
    for number, chain in enumerate(chains):
        for memory_nbytes in (1, 1 << 24):
            out = tmp_path / f"out{number}-{memory_nbytes}"
            merge_and_tell(base, out, adapter({name: chain}), memory_nbytes=memory_nbytes)
            assert torch.allclose(load(out)[name].double(), merged(old, chain), atol=1e-5)


def test_an_edited_tensor_without_elements_moves_nothing(tmp_path: Path) -> None:
    """It begins where the tensor after it does."""
    one, other = "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"
    for number in range(4):
        names = (one, other) if number % 2 else (other, one)
        tensors = {names[0]: torch.ones(0, 24).bfloat16(), names[1]: torch.ones(130, 24).bfloat16()}
        base = save_base(tmp_path / f"base{number}", tensors, config())
        updates = {name: low_rank(*tensors[name].shape) for name in names}
        merge_and_tell(base, tmp_path / f"out{number}", adapter(updates))
        update = low_rank(130, 24)
        exact = 1 + update.scale * (update.up.torch().double() @ update.down.torch().double())
        found = load(tmp_path / f"out{number}")[names[1]].double()
        assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-9).all()
