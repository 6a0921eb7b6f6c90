"""Output files of a chosen size: the same tensors, an index that is right, names that transformers knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter, config, load, low_rank, merge_and_tell, save_base, weights
from safetensors.torch import load_file

from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError, UsageError

Q, UP = "model.layers.0.q_proj.weight", "model.layers.1.up_proj.weight"
CHANGE = adapter({Q: low_rank(24, 24), UP: low_rank(130, 24)})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("most", [1, 7000, 20_000])
def test_the_tensors_are_the_same_and_no_file_is_larger(tmp_path: Path, shards: int, most: int) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=shards)
    merge_and_tell(base, tmp_path / "whole", CHANGE)
    merge_and_tell(base, tmp_path / "out", CHANGE, jobs=2, max_shard_nbytes=most)
    whole, divided = load(tmp_path / "whole"), load(tmp_path / "out")
    assert whole.keys() == divided.keys()
    assert all(torch.equal(whole[name], divided[name]) for name in whole)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for number, path in enumerate(files, 1):
        assert path.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        found = load_file(path)
        assert len(found) == 1 or sum(value.nbytes for value in found.values()) <= most
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == whole.keys()


def test_one_file_has_no_index(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=3)
    merge_and_tell(base, tmp_path / "out", CHANGE, max_shard_nbytes=1 << 30)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(("most", "counts"), [(192, [2, 2]), (193, [2, 2]), (191, [1] * 4), (288, [3, 1]), (384, [4])])
def test_a_file_is_filled_to_the_last_byte(tmp_path: Path, most: int, counts: list[int]) -> None:
    tensors = {f"{name}.weight": torch.ones(4, 6) for name in "abcd"}  # 96 bytes each
    base = save_base(tmp_path / "base", tensors, {})
    change = adapter({"a.weight": low_rank(4, 6)})
    merge_and_tell(base, tmp_path / "out", change, max_shard_nbytes=most)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [len(load_file(path)) for path in files] == counts


def test_a_tensor_that_is_larger_has_a_file_of_its_own(tmp_path: Path) -> None:
    shapes = {"a.weight": (1, 4), "b.weight": (4, 6), "c.weight": (1, 4), "d.weight": (1, 4)}
    base = save_base(tmp_path / "base", {name: torch.ones(*shape) for name, shape in shapes.items()}, {})
    merge_and_tell(base, tmp_path / "out", adapter({"b.weight": low_rank(4, 6)}), max_shard_nbytes=95)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [sorted(load_file(path)) for path in files] == [["a.weight"], ["b.weight"], ["c.weight", "d.weight"]]


@pytest.mark.parametrize("most", [0, -1])
def test_files_without_a_byte_are_refused(tmp_path: Path, most: int) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(UsageError, match=f"expected at least 1 byte, found {most}"):
        merge_and_tell(base, tmp_path / "out", CHANGE, max_shard_nbytes=most)


def test_torch_files_are_not_divided(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(MergeError, match="--container safetensors"):
        merge_and_tell(base, tmp_path / "out", CHANGE, max_shard_nbytes=1, container="torch")
