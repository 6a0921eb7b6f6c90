"""Tables that grow, in whatever windows they come; progress adds up to what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, contents, load, merge, save_base, weights

import loraformat
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank, Rows
from loraformat.storage import LocalStore

TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grown_table_is_the_same_in_any_windows(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(dtype=dtype, tied=True)
    base = save_base(tmp_path / "base", tensors, config(tied=True))
    fresh = torch.randn(230, 24, generator=torch.Generator().manual_seed(2))
    change = adapter({TABLE: Rows(tuple(range(70, 300)), LazyTensor.of(fresh))})
    small = merge(base, tmp_path / "small", change, memory_nbytes=1 << 12)
    large = merge(base, tmp_path / "large", change, memory_nbytes=1 << 26)
    assert contents(small) == contents(large)
    assert torch.equal(load(small)[TABLE], torch.cat([tensors[TABLE], fresh.to(dtype)]))


@pytest.mark.parametrize("jobs", [1, 3])
def test_progress_ends_with_all_bytes(tmp_path: Path, jobs: int) -> None:
    base = save_base(tmp_path / "base", weights(), config(), shards=2)
    change = adapter({TABLE: LowRank(LazyTensor.of(torch.ones(70, 2)), LazyTensor.of(torch.ones(2, 24)), 1.0)})
    folder = tmp_path / "change"
    loraformat.save_adapter(change, folder, to="peft")
    told: list[tuple[int, int]] = []
    loraformat.merge(base, [folder], tmp_path / "out", jobs=jobs, progress=lambda *given: told.append(given))
    total = sum(tensor.nbytes for tensor in weights().values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert LocalStore(str(tmp_path / "out")).files()
