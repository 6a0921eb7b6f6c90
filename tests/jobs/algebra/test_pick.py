"""pick: what stays keeps its bytes, the config says what is left, names change by whole components."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft_adapters import deltas, save
from safetensors.torch import load_file

import loraformat
from loraformat.cli import main
from loraformat.errors import AdapterRefused, UsageError
from loraformat.jobs.algebra.selection import matching

WEIGHTS = "adapter_model.safetensors"
NAMES = [
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.11.self_attn.q_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "lm_head.weight",
    "lm_head.bias",
]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("q_proj", [0, 1]),
        ("model.layers.1.*", [0]),
        ("layers.11.*", [1, 2]),
        ("*", [0, 1, 2, 3, 4]),
        ("mlp.*", [2]),
        ("*_proj", [0, 1, 2]),
        ("lm_head", [3, 4]),
        ("*.bias", [4]),
        ("layers=1", [0]),
        ("layers=2-11", [1, 2]),
        ("layers=0,11", [1, 2]),
        ("q_", []),
        ("proj", []),
    ],
)
def test_patterns(pattern: str, wanted: list[int]) -> None:
    assert matching(pattern, NAMES) == {NAMES[at] for at in wanted}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(
        tmp_path / "adapter", 1, rank_pattern={"layers.1.up": 5}, alpha_pattern={"down": 3}, modules_to_save=["head"]
    )


def test_what_stays_keeps_its_bytes_and_peft_makes_nothing_else(adapter: Path, tmp_path: Path) -> None:
    report = loraformat.pick(adapter, tmp_path / "out", select=["layers.1.*", "conv"], drop=["layers.1.down"])
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {name.removeprefix("base_model.model.").split(".lora")[0] for name in after} == {"layers.1.up", "conv"}
    assert all(torch.equal(before[name], value) for name, value in after.items())
    exact, found = deltas(adapter), deltas(tmp_path / "out")
    assert found.keys() == {"layers.1.up", "conv"}
    assert all((found[name] == exact[name]).all() for name in found)
    kept = sum((exact[name] ** 2).sum() for name in found)
    whole = sum((delta**2).sum() for delta in exact.values())
    assert report.data.dropped == pytest.approx(1 - kept / whole)
    assert "head.weight" in report.data.left_out


def test_dora_can_be_picked(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 1, target_modules=["up", "down"], use_dora=True)
    loraformat.pick(folder, tmp_path / "out", select=["up"])
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert after.keys() == {name for name in before if ".up." in name}
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True


def test_names_change_by_whole_components(adapter: Path, tmp_path: Path) -> None:
    report = loraformat.pick(adapter, tmp_path / "out", rename=[("layers", "model.blocks"), ("embed", "tokens")])
    names = {each.weight for each in report.data.weights}
    assert names == {
        *(f"model.blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ("up", "down")),
        *("conv.weight", "point.weight", "tokens.weight"),
    }
    before, after = loraformat.load_adapter(adapter), loraformat.load_adapter(tmp_path / "out")
    old = before.delta("layers.1.up.weight")
    assert (after.delta("model.blocks.1.up.weight") == old).all()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "nothing to do"),
        ({"select": ["upp"]}, "did you mean up"),
        ({"drop": ["nothing.*"]}, "no weight"),
        ({"rename": [("layer", "x")]}, "no name contains the components"),
        ({"rename": [("0", "1")]}, "two weights would be called"),
        ({"rename": [("", "1")]}, "OLD=NEW"),
    ],
)
def test_slips_are_usage_errors(
    adapter: Path, tmp_path: Path, choice: dict[str, list[str] | list[tuple[str, str]]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loraformat.pick(adapter, tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_nothing_is_not_written(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="nothing to write"):
        loraformat.pick(adapter, tmp_path / "out", drop=["*"])
    done = CliRunner().invoke(main, ["pick", str(adapter), "--rename", "a", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
