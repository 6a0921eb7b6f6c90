"""What `inspect` cannot show, it refuses: an adapter without updates, and one of complex numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner

from loraformat.cli import main

BAD = Path(__file__).parent.parent.parent / "fixtures" / "bad"


def test_an_adapter_without_updates_is_refused() -> None:
    result = CliRunner().invoke(main, ["inspect", str(BAD / "LF213-no-updates" / "adapter")])
    assert result.exit_code == 1
    assert "LF213" in result.stderr
    assert result.stdout == ""


def test_an_adapter_of_complex_numbers_is_refused(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A": torch.ones(2, 8, dtype=torch.complex64), f"{module}.lora_B": torch.ones(8, 2)}
    torch.save(factors, tmp_path / "lora_weights.pt")
    (tmp_path / "lora_config.json").write_text('{"rank": 2, "alpha": 2.0}')
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{module}.weight: down holds complex numbers" in result.stderr
