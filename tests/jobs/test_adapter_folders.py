"""Where adapters lie: below the folder that was named, and in parts."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.errors import FormatError, MissingFile
from loraformat.io import open_adapter


@pytest.fixture
def both(tmp_path: Path) -> Any:
    return tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("name", ["policy", "checkpoint-500"])
def test_the_only_adapter_below_a_folder_is_merged(name: str, both: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "run" / name)
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "run")], str(tmp_path / "out"))
    (told,) = [finding for finding in report.findings if finding.code == "LF248"]
    assert told.message.endswith(f"run/{name}")
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_of_several_below_none_is_taken(both: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / "run" / name).mkdir()
        for file in (tmp_path / "adapter").iterdir():
            (tmp_path / "run" / name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="2 subfolders contain an adapter: checkpoint-10, checkpoint-20"):
        open_adapter(str(tmp_path / "run"))


def test_a_config_above_its_weights_is_named(both: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "checkpoint-10").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "checkpoint-10" / "adapter_model.safetensors"
    )
    with pytest.raises(MissingFile, match="is here, and the weights are in checkpoint-10") as caught:
        open_adapter(str(tmp_path / "adapter"))
    command = caught.value.hint.removeprefix("copy it next to the weights: ")
    subprocess.run(shlex.split(command), check=True)
    assert open_adapter(str(tmp_path / "adapter" / "checkpoint-10")).adapter.updates


def test_an_adapter_with_checkpoints_below_it_is_read_itself(both: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "checkpoint-10").mkdir()
    for file in list((tmp_path / "adapter").glob("adapter_*")):
        (tmp_path / "adapter" / "checkpoint-10" / file.name).write_bytes(file.read_bytes())
    assert open_adapter(str(tmp_path / "adapter")).uri == str(tmp_path / "adapter")


def in_parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, value) in enumerate(tensors.items()):
        parts.setdefault(f"adapter_model-{number % 2 + 1:05}-of-00002.safetensors", {})[name] = value
    for file, part in parts.items():
        save_file(part, folder / file)
    return parts


def write_index(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("has_index", [True, False])
def test_an_adapter_in_parts_is_merged(has_index: bool, both: Any, tmp_path: Path) -> None:
    parts = in_parts(tmp_path / "adapter")
    if has_index:
        write_index(tmp_path / "adapter", parts)
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert "LF222" not in {finding.code for finding in report.findings}
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_a_part_that_is_missing_is_named(both: Any, tmp_path: Path) -> None:
    in_parts(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"adapter_model-00001-of-00002.safetensors: this part"):
        open_adapter(str(tmp_path / "adapter"))


def test_an_index_that_lists_other_tensors_is_refused(both: Any, tmp_path: Path) -> None:
    parts = in_parts(tmp_path / "adapter")
    next(iter(parts.values()))["one.more"] = torch.ones(1)
    write_index(tmp_path / "adapter", parts)
    with pytest.raises(FormatError, match=r"one.more is in no part"):
        open_adapter(str(tmp_path / "adapter"))


def test_a_tensor_in_two_parts_is_refused(both: Any, tmp_path: Path) -> None:
    parts = in_parts(tmp_path / "adapter")
    first, second = parts.values()
    save_file({**second, **first}, tmp_path / "adapter" / "adapter_model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="is in two parts"):
        open_adapter(str(tmp_path / "adapter"))
