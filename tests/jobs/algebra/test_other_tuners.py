"""convert --to-lora: what PEFT adds by other tuners is what it adds by the LoRA that is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft_models import Case, make, saved

import loraformat
from loraformat.errors import AdapterRefused, UnsupportedUpdate, UsageError

TARGETS = ["wide", "tall"]
EXACT = [
    Case("AdaLoraConfig", {"target_modules": TARGETS, "init_r": 4, "target_r": 2, "total_step": 10}),
    Case("MissConfig", {"target_modules": TARGETS, "r": 4}),
    Case("VeraConfig", {"target_modules": ["wide"], "r": 4, "save_projection": True}),
    Case("LoHaConfig", {"target_modules": TARGETS, "r": 2}),
    Case("LoKrConfig", {"target_modules": ["wide"], "r": 1}),
    Case("LoraConfig", {"target_modules": TARGETS, "r": 3}),
    Case("LoHaConfig", {"target_modules": ["conv", "point"], "r": 1}),
]
DEPENDENT = [
    Case("LoraConfig", {"target_modules": TARGETS, "r": 3, "use_dora": True}),
    Case("IA3Config", {"target_modules": TARGETS, "feedforward_modules": TARGETS}),
    Case("OFTConfig", {"target_modules": ["wide"], "r": 0, "oft_block_size": 4}),
]


def merged_by_peft(folder: Path, adapter: Path, case: Case) -> dict[str, torch.Tensor]:
    model = case.model()
    model.load_state_dict(saved(folder / "base"))
    loaded = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach() for name, value in loaded.state_dict().items()}


def error(folder: Path, found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖found - exact‖ / ‖change‖ over all weights."""
    base = saved(folder / "base")
    change = sum(float((exact[name] - value).double().square().sum()) for name, value in base.items())
    off = sum(float((found[name] - exact[name]).double().square().sum()) for name in base)
    assert change > 1e-3
    return float(np.sqrt(off / change))


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.config)
def test_what_has_a_low_rank_is_exact(case: Case, tmp_path: Path) -> None:
    exact = make(case, tmp_path)
    out = tmp_path / "out"
    report = loraformat.convert(tmp_path / "adapter", out, to="peft", to_lora=True, base=tmp_path / "base")
    assert "LF713" not in {each.code for each in report.findings}
    assert error(tmp_path, merged_by_peft(tmp_path, out, case), exact) < 3e-6


@pytest.mark.parametrize("case", DEPENDENT, ids=lambda case: case.config)
def test_what_depends_on_the_base_is_its_change(case: Case, tmp_path: Path) -> None:
    exact = make(case, tmp_path)
    with pytest.raises((UnsupportedUpdate, AdapterRefused), match="depends on the base"):
        loraformat.convert(tmp_path / "adapter", tmp_path / "out", to="peft", to_lora=True, error=0.1)
    for name, bound in (("near", 1e-5), ("far", 0.3)):
        report = loraformat.convert(
            tmp_path / "adapter", tmp_path / name, to="peft", to_lora=True, base=tmp_path / "base", error=bound
        )
        found = error(tmp_path, merged_by_peft(tmp_path, tmp_path / name, case), exact)
        assert found <= bound + 3e-6
        assert any(each.code == "LF713" for each in report.findings) == (name == "far")
    assert not (tmp_path / "out").exists()


def test_a_rank_is_kept_and_what_it_costs_is_told(tmp_path: Path) -> None:
    case = Case("LoHaConfig", {"target_modules": TARGETS, "r": 3})
    exact = make(case, tmp_path)
    report = loraformat.convert(tmp_path / "adapter", tmp_path / "out", to="peft", to_lora=True, rank=4)
    (finding,) = (each for each in report.findings if each.code == "LF713")
    found = error(tmp_path, merged_by_peft(tmp_path, tmp_path / "out", case), exact)
    assert f"{found:.3g} of the norm" in finding.message
    assert set(loraformat.inspect(tmp_path / "out").summary.ranks) == {4}
    with pytest.raises(AdapterRefused, match="only approximated"):
        loraformat.convert(tmp_path / "adapter", tmp_path / "no", to="peft", to_lora=True, rank=4, strict=True)


def test_full_rank_needs_a_rule_and_a_rule_needs_the_option(tmp_path: Path) -> None:
    make(Case("LoHaConfig", {"target_modules": TARGETS, "r": 4}), tmp_path)
    with pytest.raises(UsageError, match="of 24"):
        loraformat.convert(tmp_path / "adapter", tmp_path / "out", to="peft", to_lora=True)
    with pytest.raises(UsageError, match="need --to-lora"):
        loraformat.convert(tmp_path / "adapter", tmp_path / "out", to="peft", rank=3)
    assert not (tmp_path / "out").exists()
