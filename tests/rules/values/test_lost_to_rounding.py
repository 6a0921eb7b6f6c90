"""LF406 foretells what a merge then measures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.jobs.merge import merge
from loraformat.jobs.validate import validate

CASE = Path(__file__).parents[3] / "fixtures" / "bad" / "LF406-lost-to-rounding"


def test_the_share_that_is_foretold_is_the_share_that_is_kept(tmp_path: Path) -> None:
    """The weights have fewer rows than are sampled, so the two are the same sum."""
    (finding,) = validate(str(CASE / "adapter"), base=str(CASE / "base"), deep=True).findings
    found = re.match(r"([\d.]+)% of the update", finding.message)
    assert found is not None
    merged = merge(str(CASE / "base"), [str(CASE / "adapter")], str(tmp_path / "out"))
    assert merged.data.retained * 100 == pytest.approx(float(found[1]), abs=0.05)


def half_lost(folder: Path, kept_columns: int) -> tuple[Path, Path]:
    """A base of ones in bfloat16, and an update of one step in some of its 16 columns and of 0.4 steps in the others.

    The step above 1 is 2^-7: what is one step stays, what is 0.4 steps is rounded away. So of the squares
    kept / (kept + 0.16 lost) survives.
    """
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.weight": torch.ones(8, 16, dtype=torch.bfloat16)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    steps = torch.full((1, 16), 0.4)
    steps[:, :kept_columns] = 1.0
    factors = {"lora_A": steps * 2.0**-7, "lora_B": torch.ones(8, 1)}
    tensors = {f"base_model.model.{name}.{factor}.weight": value for factor, value in factors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "x"}))
    return base, adapter


@pytest.mark.parametrize(("kept_columns", "share", "is_told"), [(2, 0.472, True), (8, 0.862, True), (10, 0.912, False)])
def test_less_than_nine_tenths_is_told_before_and_after_a_merge(
    tmp_path: Path, kept_columns: int, share: float, is_told: bool
) -> None:
    base, adapter = half_lost(tmp_path, kept_columns)
    merged = merge(str(base), [str(adapter)], str(tmp_path / "out"))
    assert merged.data.retained == pytest.approx(share, abs=5e-4)
    assert ("LF803" in [each.code for each in merged.findings]) == is_told
    foretold = [each for each in validate(str(adapter), base=str(base), deep=True).findings if each.code == "LF406"]
    assert [each.message[:5] for each in foretold] == ([f"{share:.1%}"] if is_told else [])
