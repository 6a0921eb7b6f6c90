"""The safetensors library as a second reader, without PyTorch: it says otherwise where we read a file wrongly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, low_rank, save_base
from safetensors.torch import save_file

from loraformat.containers import open_checkpoint, open_weights
from loraformat.errors import MergeError
from loraformat.merger import AdapterSource, ShardPlan, plan_merge
from loraformat.merger.verify.safetensors_library import check_with_library
from loraformat.model.tensors import DType
from loraformat.storage import LocalStore

NAMES = ("a.weight", "b.weight")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int16, torch.uint8]


@pytest.fixture
def shard(tmp_path: Path) -> ShardPlan:
    """Of a file of that name."""
    base = open_checkpoint(str(save_base(tmp_path / "base", {"a.weight": torch.ones(6, 4)}, {})))
    (found,) = plan_merge(base, [adapter({"a.weight": low_rank(6, 4)})], [AdapterSource("a", "x")]).shards
    return found


def written(folder: Path, shard: ShardPlan, dtype: torch.dtype) -> LocalStore:
    g = torch.Generator().manual_seed(1)
    tensors = {name: (torch.randn(6, 4, 3, generator=g) * 9).to(dtype) for name in NAMES}
    folder.mkdir()
    more = {"c.bias": torch.ones(3).bfloat16(), "scalar": torch.ones(()), "none": torch.ones(0, 4).bfloat16()}
    save_file(tensors | more, folder / shard.target)
    return LocalStore(str(folder))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_that_is_read_rightly_passes(tmp_path: Path, shard: ShardPlan, dtype: torch.dtype) -> None:
    store = written(tmp_path / "out", shard, dtype)
    check_with_library(store, shard, open_weights(store, [shard.target])[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_we_exchange_are_found(tmp_path: Path, shard: ShardPlan, dtype: torch.dtype) -> None:
    store = written(tmp_path / "out", shard, dtype)
    tensors = dict(open_weights(store, [shard.target])[1])
    one, other = (tensors[name] for name in NAMES)
    tensors |= {NAMES[0]: replace(one, span=other.span), NAMES[1]: replace(other, span=one.span)}
    with pytest.raises(MergeError, match=r"weight: the safetensors library reads other values than loraformat in row"):
        check_with_library(store, shard, tensors)


def test_another_dtype_or_shape_or_name_is_found(tmp_path: Path, shard: ShardPlan) -> None:
    store = written(tmp_path / "out", shard, torch.bfloat16)
    right = dict(open_weights(store, [shard.target])[1])
    first = right[NAMES[0]]
    for wrong in (
        {**right, NAMES[0]: replace(first, dtype=DType.F16)},
        {**right, NAMES[0]: replace(first, shape=(4, 6, 3))},
        {name: tensor for name, tensor in right.items() if name != "c.bias"},
    ):
        with pytest.raises(MergeError, match="reads other tensors than loraformat"):
            check_with_library(store, shard, wrong)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="files in memory are looked up in /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_error_does_not_keep_the_file_in_memory(tmp_path: Path, shard: ShardPlan, dtype: torch.dtype) -> None:
    """Windows removes no file that is mapped, and the output is removed while the error is on its way."""
    store = written(tmp_path / "out", shard, dtype)
    right = dict(open_weights(store, [shard.target])[1])
    first, other = (right[name] for name in NAMES)
    for wrong in (replace(first, span=other.span), replace(first, shape=(4, 6, 3))):
        with pytest.raises(MergeError) as caught:
            check_with_library(store, shard, {**right, NAMES[0]: wrong})
        assert str(tmp_path / "out" / shard.target) not in Path("/proc/self/maps").read_text(), caught.value


def test_a_file_that_the_library_cannot_read_is_refused(tmp_path: Path, shard: ShardPlan) -> None:
    store = written(tmp_path / "out", shard, torch.bfloat16)
    tensors = open_weights(store, [shard.target])[1]
    path = tmp_path / "out" / shard.target
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MergeError, match="the safetensors library cannot read the file"):
        check_with_library(store, shard, tensors)
