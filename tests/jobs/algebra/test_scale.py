"""scale: through alpha alone, or baked into B; ΔW as PEFT adds it."""

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
from loraformat.errors import UnsupportedUpdate, UsageError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=[False, True], ids=["by rank", "by root"])
def adapter(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return save(
        tmp_path / "adapter", 1, use_rslora=request.param, rank_pattern={"layers.1.up": 5}, alpha_pattern={"down": 3}
    )


@pytest.mark.parametrize("weight", [0.5, -1.25, 0.3, 0.0, 7.0])
def test_alpha_alone_changes(adapter: Path, tmp_path: Path, weight: float) -> None:
    loraformat.scale(adapter, tmp_path / "out", weight=weight)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    exact, found = deltas(adapter), deltas(tmp_path / "out")
    for name, delta in exact.items():
        assert found[name] == pytest.approx(delta * weight, rel=1e-12, abs=1e-15)


def test_rslora_stays_rslora(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 1, use_rslora=True)
    loraformat.scale(f"{folder}=0.25", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert config["lora_alpha"] == 3


@pytest.mark.parametrize("weight", [0.5, -0.3])
def test_baked_b_changes_and_alpha_stays(adapter: Path, tmp_path: Path, weight: float) -> None:
    report = loraformat.scale(adapter, tmp_path / "out", weight=weight, bake=True)
    assert any(each.code == "LF701" for each in report.findings) == (weight != 0.5)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before if "_A" in name)
    exact, found = deltas(adapter), deltas(tmp_path / "out")
    for name, delta in exact.items():
        assert found[name] == pytest.approx(delta * weight, rel=1e-6, abs=1e-7)
    one, other = (json.loads((each / "adapter_config.json").read_text()) for each in (adapter, tmp_path / "out"))
    assert one["lora_alpha"] == other["lora_alpha"]


def test_what_is_not_proportional_is_refused(tmp_path: Path) -> None:
    dora = save(tmp_path / "dora", 1, target_modules=["up"], use_dora=True)
    with pytest.raises(UnsupportedUpdate, match="magnitude"):
        loraformat.scale(dora, tmp_path / "out", weight=0.5)
    saved = save(tmp_path / "saved", 1, target_modules=["up"], modules_to_save=["head"])
    with pytest.raises(UnsupportedUpdate, match=r"head\.\w+: the weight is replaced"):
        loraformat.scale(saved, tmp_path / "out", weight=0.5)
    assert not (tmp_path / "out").exists()
    loraformat.pick(saved, tmp_path / "picked", drop=["head"])
    loraformat.scale(tmp_path / "picked", tmp_path / "out", weight=0.5)


def test_a_number_is_wanted(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ADAPTER=0\.5"):
        loraformat.scale(adapter, tmp_path / "out")
    done = CliRunner().invoke(main, ["scale", f"{adapter}=half", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
