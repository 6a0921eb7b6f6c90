"""`loraformat merge BASE ADAPTER=0.7`: a path that exists wins, else the last = splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from merger.checkpoints import adapter_folder, config, save_base, weights
from safetensors.torch import load_file, save_file

from loraformat.cli import main
from loraformat.errors import UsageError
from loraformat.jobs.inputs.strength import with_strength
from loraformat.jobs.merge import merge

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("lora=0.7", ("lora", 0.7)), ("a=b=-1e-1", ("a=b", -0.1)), ("lora", ("lora", 1.0)), ("lora=0", ("lora", 0.0))],
)
def test_the_last_equals_sign_splits(argument: str, expected: tuple[str, float]) -> None:
    assert with_strength(argument) == expected


def test_a_path_that_exists_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "lora=0.5"
    folder.mkdir()
    assert with_strength(str(folder)) == (str(folder), 1.0)
    assert with_strength(f"{folder}=0.25") == (str(folder), 0.25)


@pytest.mark.parametrize("argument", ["lora=strong", "lora=", "=0.5", "lora=nan", "lora=inf"])
def test_what_is_no_strength_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="finite number"):
        with_strength(argument)


def test_two_adapters_at_their_strengths(tmp_path: Path) -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "base").mkdir()
    save_file({f"{Q}.weight": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    factors = {}
    for number, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(number)
        a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        factors[name] = b @ a
        (tmp_path / name).mkdir()
        save_file(
            {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b},
            tmp_path / name / "adapter_model.safetensors",
        )
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    arguments = ["merge", str(tmp_path / "base"), f"{tmp_path / 'a'}=0.7", f"{tmp_path / 'b'}=-2", "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "strength 0.7" in result.output
    merged = load_file(out / "model.safetensors")[f"{Q}.weight"]
    assert torch.allclose(merged, weight + 0.7 * factors["a"] - 2 * factors["b"], atol=1e-5)


@pytest.mark.parametrize(("strength", "is_said"), [("0", True), ("-0.0", True), ("1e-300", True), ("0.01", False)])
def test_a_strength_that_leaves_nothing_is_warned_of(tmp_path: Path, strength: str, is_said: bool) -> None:
    base = save_base(tmp_path / "base", weights(), config())
    change = adapter_folder(tmp_path / "adapter", {"model.layers.0.q_proj.weight": (24, 24)})
    report = merge(str(base), [f"{change}={strength}"], str(tmp_path / "out"))
    assert ("LF820" in {one.code for one in report.findings}) == is_said
