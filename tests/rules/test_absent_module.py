"""What the hint of LF301 names: the same module under another name, or plainly something else."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraformat import validate


def hint(adapter: str, base: str, tmp_path: Path) -> str:
    (tmp_path / "base").mkdir()
    # Another weight beside it, so that no change of one prefix explains the name.
    save_file({base: torch.zeros(4, 4), "other.weight": torch.zeros(4, 4)}, tmp_path / "base" / "model.safetensors")
    factors = {f"{module}.lora_{side}": torch.ones(4, 4) for module in (adapter, "other") for side in "AB"}
    torch.save(factors, tmp_path / "adapter.pt")
    report = validate(tmp_path / "adapter.pt", base=tmp_path / "base", alpha=4.0)
    (found,) = (finding for finding in report.findings if finding.code == "LF301")
    assert found.where == f"{adapter}.weight"
    return found.hint


def test_the_same_module_under_another_name_is_what_the_base_has(tmp_path: Path) -> None:
    said = hint("decoder.layers.1.attn.q_proj", "model.inner.layers.1.self_attn.q_proj.weight", tmp_path)
    assert said == "the base has model.inner.layers.1.self_attn.q_proj.weight"


def test_another_module_is_not_said_to_be_it(tmp_path: Path) -> None:
    base = "model.layers.1.self_attn.k_proj.weight"
    said = hint("model.layers.1.self_attn.q_proj", base, tmp_path)
    assert said == f"the most similar name in the base is {base}; if it is the same weight, rename the tensors"


def test_where_no_update_matches_one_finding_names_the_base_that_was_meant() -> None:
    fixtures = Path(__file__).parents[2] / "fixtures"
    report = validate(fixtures / "good" / "peft" / "tiny-llama", base=fixtures / "minigpt" / "base")
    (found,) = (finding for finding in report.findings if finding.code == "LF301")
    assert "none of the 9 updates matches" in found.message
    said, _, similar = found.hint.partition(": its names look like ")
    assert said == "the adapter names loraformat/tiny-llama as its base; this base is probably another model"
    assert re.fullmatch(r"blocks\.\d\.attention\.\w_proj\.weight", similar)


def test_the_hint_about_an_absent_component_selects_one_that_the_adapter_has() -> None:
    fixtures = Path(__file__).parents[2] / "fixtures"
    report = validate(fixtures / "good" / "kohya" / "tiny-flux", base=fixtures / "minigpt" / "base")
    hints = [finding.hint for finding in report.findings if finding.code == "LF301"]
    assert any("--select 'transformer.*'" in each for each in hints)
    assert not any("unet" in each for each in hints)


def test_a_layer_beyond_the_last_one_is_said_to_be_that(tmp_path: Path) -> None:
    said = hint("model.layers.9.self_attn.q_proj", "model.layers.1.self_attn.q_proj.weight", tmp_path)
    assert said == "the base's model.layers end with 1, so it is a smaller or a different model"
