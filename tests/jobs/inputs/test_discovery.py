"""Which adapters a path stands for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from loraformat.cli import main
from loraformat.jobs.inputs import discovery
from loraformat.jobs.inputs.discovery import discover

FIXTURES = Path(__file__).parents[3] / "fixtures"
PEFT = FIXTURES / "good" / "peft" / "tiny-llama"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def found(*paths: Path, recursive: bool = True) -> list[str]:
    root = os.path.commonpath(paths)
    adapters = discover([str(path) for path in paths], recursive=recursive).adapters
    return [os.path.relpath(adapter, root) for adapter in adapters]


def native() -> Path:
    return next(path.parent for path in sorted((FIXTURES / "good" / "native").rglob("lora_config.json")))


def put(folder: Path, adapter: Path = PEFT) -> Path:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def run_of_a_trainer(tmp_path: Path) -> Path:
    """What a Trainer leaves: the last adapter, and checkpoints with the state of the optimizer beside them."""
    folder = put(tmp_path / "run")
    for step in (1000, 500):
        put(folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"no tensors")
    return folder


def test_the_checkpoints_of_a_run_are_adapters_of_their_own(run_of_a_trainer: Path) -> None:
    assert found(run_of_a_trainer) == [".", "checkpoint-500", "checkpoint-1000"]
    assert found(run_of_a_trainer, recursive=False) == ["."]


def test_a_run_with_checkpoints_alone_stands_for_them(run_of_a_trainer: Path) -> None:
    for path in run_of_a_trainer.iterdir():
        if path.is_file():
            path.unlink()
    torch.save({"args": 1}, run_of_a_trainer / "training_args.bin")
    assert found(run_of_a_trainer) == ["checkpoint-500", "checkpoint-1000"]


def test_a_file_of_an_adapter_stands_for_its_folder_and_nothing_below(run_of_a_trainer: Path) -> None:
    """Hooks and the action name the files that changed."""
    assert discover([str(run_of_a_trainer / "adapter_config.json")]).adapters == (str(run_of_a_trainer),)
    assert discover([str(run_of_a_trainer / "adapter_model.safetensors")]).adapters == (str(run_of_a_trainer),)


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_a_file_is_taken_as_it_is_where_its_format_was_chosen(verb: str, run_of_a_trainer: Path) -> None:
    weights = run_of_a_trainer / "adapter_model.safetensors"
    assert discover([str(weights)], format="dump").adapters == (str(weights),)
    told = run(verb, weights, "--from", "dump", "--alpha", 4, "--format", "json")
    assert json.loads(told.stdout)["format"] == "dump"


def test_adapters_of_peft_lie_one_in_a_subfolder(tmp_path: Path) -> None:
    put(tmp_path / "style")
    put(tmp_path / "facts")
    put(tmp_path / "deep" / "er" / "native", native())
    assert found(tmp_path) == ["deep/er/native", "facts", "style"]


def test_an_adapter_is_told_once_however_often_it_is_named(run_of_a_trainer: Path) -> None:
    inner = run_of_a_trainer / "checkpoint-500"
    assert found(run_of_a_trainer, inner) == [".", "checkpoint-500", "checkpoint-1000"]


def test_weight_files_side_by_side_are_adapters_each(tmp_path: Path) -> None:
    for name in ("first.pt", "second.pt"):
        torch.save({"q.lora_A": torch.zeros(2, 8), "q.lora_B": torch.zeros(8, 2)}, tmp_path / name)
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    assert found(tmp_path) == ["damaged.pt", "first.pt", "second.pt"]


def test_what_is_passed_over_is_said_in_numbers(tmp_path: Path) -> None:
    put(tmp_path / "adapters" / "one")
    (tmp_path / "base").mkdir()
    torch.save({"q.weight": torch.zeros(2, 2)}, tmp_path / "base" / "model.pt")
    (tmp_path / "link").symlink_to(tmp_path / "adapters")
    told = discover([str(tmp_path)])
    assert told.adapters == (str(tmp_path / "adapters" / "one"),)
    assert told.notes == (
        f"{tmp_path}: not checked: 1 weight file outside of adapters: base/model.pt",
        f"{tmp_path}: not searched: 1 link to folders",
    )


def test_a_link_to_a_parent_ends_no_search(run_of_a_trainer: Path) -> None:
    (run_of_a_trainer / "checkpoint-500" / "again").symlink_to(run_of_a_trainer)
    assert found(run_of_a_trainer) == [".", "checkpoint-500", "checkpoint-1000"]


def test_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    put(tmp_path / "one")
    put(tmp_path / ".cache" / "two")
    assert found(tmp_path) == ["one"]


def test_a_folder_without_adapters_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert found(tmp_path / "empty") == ["."]
    assert run("validate", tmp_path / "empty").exit_code == 1


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_folders_deeper_than_the_bound_are_an_error_never_ok(verb: str, tmp_path: Path) -> None:
    put(tmp_path / "one")
    put(tmp_path.joinpath("one", *"abcdefghijklmnopq"))
    put(tmp_path / "two")
    told = run(verb, tmp_path / "one", tmp_path / "two", "--format", "json")
    assert told.exit_code == 3
    first, second = json.loads(told.stdout)["reports"]
    assert first["findings"][0]["message"] == "folders are nested more than 16 levels deep"
    assert second["ok"]


def test_more_adapters_than_the_bound_are_an_error_never_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        put(tmp_path / f"{number}")
    monkeypatch.setattr(discovery, "MOST_ADAPTERS", 3)
    told = run("validate", tmp_path)
    assert told.exit_code == 3
    assert "more than 3 adapters below" in told.stderr


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_every_adapter_below_is_judged(verb: str, run_of_a_trainer: Path) -> None:
    (run_of_a_trainer / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"\x00")
    told = run(verb, run_of_a_trainer, "--format", "json")
    assert told.exit_code == (1 if verb == "validate" else 3)
    reports = json.loads(told.stdout)["reports"]
    assert [report["ok"] for report in reports] == [True, False, True]
    assert run(verb, run_of_a_trainer, "--no-recursive").exit_code == 0
