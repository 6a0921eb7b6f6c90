"""loralib adapters of models in which some layers store (in, out): which ones they are the caller says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.errors import ConfigError
from loraformat.model.assumptions import Assumptions


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """A base whose fc2 stores (in, out) beside an fc1 that does not and an embedding; what loralib adds to each."""
    torch.manual_seed(0)
    base = {
        "net.fc1.weight": torch.randn(24, 16),
        "net.fc2.weight": torch.randn(24, 16),
        "net.square.fc2.weight": torch.randn(16, 16),
        "net.square.fc1.weight": torch.randn(16, 16),
    }
    save_file(base, folder / "base.safetensors")
    sizes = {"net.fc1": (24, 16), "net.fc2": (16, 24), "net.square.fc2": (16, 16), "net.square.fc1": (16, 16)}
    factors, added = {}, {}
    for module, (rows, cols) in sizes.items():
        a, b = torch.randn(2, cols), torch.randn(rows, 2)
        factors |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        added[f"{module}.weight"] = (b @ a).T if module.endswith("fc2") else b @ a
    torch.save(factors, folder / "lora.pt")
    return {name: base[name] + added[name] for name in base}


def test_modules_that_are_named_are_transposed_and_no_others(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    said = Assumptions(alpha=2, fan_in_fan_out=("fc2",))
    base, adapter, out = (str(tmp_path / name) for name in ("base.safetensors", "lora.pt", "out"))
    loraformat.merge(base, [adapter], out, assumptions=said, verify="full")
    merged = load_file(tmp_path / "out" / "base.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


def test_a_layer_that_nobody_names_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    base, adapter, out = (str(tmp_path / name) for name in ("base.safetensors", "lora.pt", "out"))
    with pytest.raises(ConfigError) as caught:
        loraformat.merge(base, [adapter], out, assumptions=Assumptions(alpha=2))
    assert '["fc2"]' in caught.value.hint
