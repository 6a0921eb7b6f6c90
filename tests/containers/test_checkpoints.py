"""open_checkpoint: which files are the weights, and what is wrong with a folder that is not a base model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.containers import open_checkpoint, read_rows
from loraformat.errors import ConfigError, FormatError, InvalidJson, LoraFormatError, MissingFile, NotATensorFile
from loraformat.model.tensors import DType
from loraformat.storage import open_store


def st(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: torch.ones(2, 2) for tensor in tensors}, folder / name, {"format": "pt"})


def pt(folder: Path, name: str, *tensors: str) -> None:
    torch.save({tensor: torch.zeros(2, 2) for tensor in tensors}, folder / name)


def index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    st(tmp_path, "model.safetensors", "a", "b")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "tokenizer.json").write_text("{")
    found = open_checkpoint(str(tmp_path))
    assert list(found.files) == ["model.safetensors"]
    assert sorted(found.tensors) == ["a", "b"]
    assert found.config == {"model_type": "x"}
    assert found.others == {"config.json": 19, "tokenizer.json": 1}
    assert found.index is None
    file = found.files["model.safetensors"]
    assert (file.container, file.metadata, file.names) == ("safetensors", {"format": "pt"}, ("a", "b"))
    assert file.nbytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.tensors["a"].span.offset == file.data_start
    assert found.tensors["a"].dtype is DType.F32
    assert found.parameters == 8
    assert read_rows(open_store(str(tmp_path)), found.tensors["b"], 0, 2).tolist() == [[1, 1], [1, 1]]


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    st(tmp_path, "model-1.safetensors", "a")
    st(tmp_path, "model-2.safetensors", "b")
    st(tmp_path, "model-old.safetensors", "a")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    found = open_checkpoint(str(tmp_path))
    assert list(found.files) == ["model-1.safetensors", "model-2.safetensors"]
    assert found.index == "model.safetensors.index.json"
    assert set(found.others) == {"model-old.safetensors", "model.safetensors.index.json"}


def test_shards_without_an_index_are_all_taken(tmp_path: Path) -> None:
    st(tmp_path, "model-1.safetensors", "a")
    st(tmp_path, "model-2.safetensors", "b")
    st(tmp_path, "extra.safetensors", "c")
    assert sorted(open_checkpoint(str(tmp_path)).tensors) == ["a", "b"]
    st(tmp_path, "model-2.safetensors", "a", "b")
    with pytest.raises(FormatError, match=r"a is also in model-1.safetensors") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.where == "model-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "kind", "message"),
    [
        ({"a": "model-1.safetensors", "b": "absent.safetensors"}, MissingFile, '"absent.safetensors" is missing'),
        (
            {"a": "model-1.safetensors", "x": "model-1.safetensors"},
            FormatError,
            "x is listed in model.safetensors.index",
        ),
        ({"a": "model-2.safetensors", "b": "model-2.safetensors"}, FormatError, "a is listed"),
        (
            {"a": "model-1.safetensors"},
            FormatError,
            "a2 is in the file, but model.safetensors.index.json does not list",
        ),
        ({"a": "../secret.safetensors"}, ConfigError, "expected a file name without folders"),
        ({"a": "..\\secret.safetensors"}, ConfigError, "expected a file name"),
        ({"a": "/etc/passwd"}, ConfigError, "expected a file name"),
        ({"a": ".."}, ConfigError, "expected a file name"),
        ({"a": ""}, ConfigError, "expected a file name"),
        ({"a": None}, ConfigError, "expected a file name"),
        ({"a": 3}, ConfigError, "expected a file name"),
        ([], ConfigError, "weight_map: expected an object"),
        ({}, ConfigError, "weight_map: expected an object"),
        (None, ConfigError, "weight_map: expected an object"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: object, kind: type[LoraFormatError], message: str) -> None:
    st(tmp_path, "model-1.safetensors", "a", "a2")
    st(tmp_path, "model-2.safetensors", "b")
    index(tmp_path, weight_map)
    with pytest.raises(LoraFormatError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert type(caught.value) is kind


def test_safetensors_win_over_bin_and_bin_over_pt(tmp_path: Path) -> None:
    pt(tmp_path, "model.pt", "p")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["p"]
    pt(tmp_path, "pytorch_model.bin", "q")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["q"]
    st(tmp_path, "model.safetensors", "r")
    found = open_checkpoint(str(tmp_path))
    assert list(found.tensors) == ["r"]
    assert set(found.others) == {"model.pt", "pytorch_model.bin"}


def test_bin_shards(tmp_path: Path) -> None:
    pt(tmp_path, "pytorch_model-1.bin", "a")
    pt(tmp_path, "pytorch_model-2.bin", "b")
    pt(tmp_path, "training_args.bin", "x")
    index(tmp_path, {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}, "pytorch_model.bin.index.json")
    found = open_checkpoint(str(tmp_path))
    assert (list(found.files), found.index) == (
        ["pytorch_model-1.bin", "pytorch_model-2.bin"],
        "pytorch_model.bin.index.json",
    )
    assert {file.container for file in found.files.values()} == {"torch"}


def test_what_a_trainer_leaves_is_no_weight_file(tmp_path: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "training_args.bin"):
        pt(tmp_path, name, "x")
    with pytest.raises(MissingFile, match="no model weights found"):
        open_checkpoint(str(tmp_path))
    pt(tmp_path, "best.pth", "w")
    assert list(open_checkpoint(str(tmp_path)).files) == ["best.pth"]


def test_several_pt_files_are_ambiguous_unless_one_is_the_model(tmp_path: Path) -> None:
    pt(tmp_path, "a.pt", "w")
    pt(tmp_path, "b.pt", "w")
    with pytest.raises(FormatError, match=r"several weight files: a\.pt, b\.pt .*pass the path of one of them"):
        open_checkpoint(str(tmp_path))
    pt(tmp_path, "model.pt", "w")
    assert list(open_checkpoint(str(tmp_path)).files) == ["model.pt"]


def test_a_torch_checkpoint_keeps_wrapper_ties_and_extras(tmp_path: Path) -> None:
    table = torch.ones(3, 2)
    torch.save({"model": {"wte": table, "head": table, "t": torch.ones(4, 3).T}, "step": 1}, tmp_path / "model.pt")
    found = open_checkpoint(str(tmp_path))
    file = found.files["model.pt"]
    assert (file.wrapper, file.has_extras, file.names) == (("model",), True, ("wte", "head", "t"))
    assert found.tensors["wte"] == found.tensors["head"]
    assert found.tensors["t"].strides == (1, 3)
    assert found.parameters == 6 + 12


@pytest.mark.parametrize("name", ["one.safetensors", "one.pt", "one"])
def test_one_weight_file_is_a_checkpoint(tmp_path: Path, name: str) -> None:
    if name == "one.safetensors":
        st(tmp_path, name, "a")
    else:
        pt(tmp_path, name, "a")
    (tmp_path / "config.json").write_text("{")
    found = open_checkpoint(str(tmp_path / name))
    assert (list(found.files), list(found.tensors), found.config, found.others) == ([name], ["a"], {}, {})


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    st(tmp_path, "adapter_model.safetensors", "a")
    with pytest.raises(FormatError, match="this is an adapter, not a base model"):
        open_checkpoint(str(tmp_path))


def test_a_text_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("these are my notes\n")
    with pytest.raises(NotATensorFile, match="a plain text"):
        open_checkpoint(str(tmp_path / "notes"))


@pytest.mark.parametrize(("text", "kind"), [("[]", ConfigError), ("{", InvalidJson), ('{"a":1,"a":2}', InvalidJson)])
def test_config_is_strict(tmp_path: Path, text: str, kind: type[LoraFormatError]) -> None:
    st(tmp_path, "model.safetensors", "a")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind):
        open_checkpoint(str(tmp_path))


def test_a_folder_of_many_shards_is_not_listed_for_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 of them took two minutes."""
    shard_of = {f"w{number}": f"s{number}.safetensors" for number in range(50)}
    for name, shard in shard_of.items():
        save_file({name: torch.ones(1)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert len(open_checkpoint(str(tmp_path)).tensors) == 50
    assert len(listed) < 5
