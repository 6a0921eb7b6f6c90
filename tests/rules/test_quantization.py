"""What is said of quantized bases: by rules, by inspect, and by a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization.encoders import ENCODERS, MODULE, Encoded, write
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.errors import FormatError

FORMS = ["bitsandbytes NF4", "FP8, blocks of 8 x 16", "GPTQ, 4 bits", "AWQ", "compressed-tensors, 4 bits"]


def encoded(name: str, out: int = 16, inputs: int = 64) -> Encoded:
    return ENCODERS[name](np.random.default_rng(11), out, inputs)


def adapter(folder: Path, out: int = 16, inputs: int = 64, base_model: str | None = "a/b", card: str = "") -> Path:
    folder.mkdir()
    tensors = {"lora_A": torch.ones(2, inputs), "lora_B": torch.ones(out, 2)}
    named = {f"base_model.model.{MODULE}.{name}.weight": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base_model}))
    if card:
        (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {card}\n---\n")
    return folder


def codes_of(report: Any) -> set[str]:
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize("name", FORMS)
def test_shapes_are_those_of_the_decoded_weight(tmp_path: Path, name: str) -> None:
    base = write(tmp_path / "b", encoded(name))
    fitting = loraformat.validate(str(adapter(tmp_path / "a")), base=str(base))
    assert not {"LF301", "LF302", "LF309"} & codes_of(fitting)
    (finding,) = (one for one in fitting.findings if one.code == "LF311")
    assert "1 weight stored as codes, 1 of them adapted" in finding.message
    assert "LF302" in codes_of(loraformat.validate(str(adapter(tmp_path / "w", inputs=32)), base=str(base)))


@pytest.mark.parametrize("name", FORMS)
def test_inspect_shows_the_scheme_and_measures_the_decoded_weight(tmp_path: Path, name: str) -> None:
    one = encoded(name)
    base, change = write(tmp_path / "b", one), adapter(tmp_path / "a")
    report = loraformat.inspect(str(change), base=str(base), norms=True)
    assert report.data.base_scheme == name.partition(" ")[0].rstrip(",")
    assert report.data.base_scheme in str(report)
    wanted = np.linalg.norm(np.full((16, 64), 2.0)) / np.linalg.norm(one.values.astype(np.float64))
    assert report.data.weights[0].relative_norm == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPTQ v2 under the label of v1", "checkpoint_format says gptq, all zero points are 8 as in gptq_v2"),
        ("GPTQ, asymmetric, act-order", "asymmetric"),
        ("GPTQ, 4 bits", ""),
        ("GPTQ v2", ""),
    ],
)
def test_a_label_that_was_not_believed_is_told_by_every_verb(tmp_path: Path, name: str, said: str) -> None:
    base, change = write(tmp_path / "b", encoded(name)), adapter(tmp_path / "a")
    for report in (
        loraformat.validate(str(change), base=str(base)),
        loraformat.merge(str(base), [str(change)], str(tmp_path / "m"), dequantize=True),
        loraformat.dequantize(str(base), str(tmp_path / "d")),
    ):
        found = [finding.message for finding in report.findings if finding.code == "LF314"]
        assert len(found) == bool(said)
        assert said in "".join(found)


@pytest.mark.parametrize(
    ("end", "tensor"),
    [
        (".qweight", torch.zeros(8, 16, dtype=torch.int32)),
        (".weight_packed", torch.zeros(8, 16, dtype=torch.int32)),
        (".weight", torch.zeros(128, 1, dtype=torch.uint8)),
        (".weight", torch.zeros(8, 16).to(torch.float8_e5m2)),
        (".SCB", torch.zeros(16)),
    ],
)
def test_codes_of_another_scheme_are_not_copied_as_if_they_were_dense(
    tmp_path: Path, end: str, tensor: torch.Tensor
) -> None:
    folder = write(tmp_path / "b", encoded("bitsandbytes NF4"))
    tensors = load_file(folder / "model.safetensors")
    other = f"model.layers.0.mlp.down_proj{end}"
    save_file({**tensors, other: tensor}, folder / "model.safetensors")
    with pytest.raises(FormatError, match="down_proj"):
        loraformat.dequantize(str(folder), str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_settings_of_another_scheme_than_the_tensors(tmp_path: Path) -> None:
    """Each scheme's settings above each other one's tensors."""
    for name in FORMS:
        for other in FORMS:
            if name == other:
                continue
            one = encoded(name)
            folder = write(tmp_path / f"{name} {other}", Encoded(one.tensors, encoded(other).settings, one.values))
            with pytest.raises(FormatError):
                loraformat.dequantize(str(folder), str(tmp_path / "o"))


def test_half_of_a_fused_group(tmp_path: Path) -> None:
    base, change = write(tmp_path / "b", encoded("FP8, blocks of 8 x 16")), adapter(tmp_path / "a")
    assert "LF315" not in codes_of(loraformat.validate(str(change), base=str(base)))
    tensors = load_file(base / "model.safetensors")
    dense = {f"model.layers.{layer}.self_attn.v_proj.weight": torch.zeros(8, 64) for layer in (0, 1)}
    save_file({**tensors, **dense}, base / "model.safetensors")
    (finding,) = (one for one in loraformat.validate(str(change), base=str(base)).findings if one.code == "LF315")
    assert finding.location.tensor == "model.layers.0.self_attn.v_proj.weight"
    assert finding.location.more == 0


@pytest.mark.parametrize(
    ("config", "card", "found", "words"),
    [
        ("unsloth/x-bnb-4bit", "", "adapter_config.json", "16-bit model"),
        ("TheBloke/x-GPTQ", "", "adapter_config.json", "16-bit model"),
        ("Qwen/x-AWQ", "", "adapter_config.json", "does not fit the 16-bit model"),
        ("a/x-FP8", "", "adapter_config.json", "16-bit model"),
        (None, "Qwen/x-AWQ", "README.md", "does not fit the 16-bit model"),
        ("a/b", "", "", ""),
    ],
)
def test_an_adapter_that_was_trained_on_codes(
    tmp_path: Path, config: str | None, card: str, found: str, words: str
) -> None:
    report = loraformat.validate(str(adapter(tmp_path / "a", base_model=config, card=card)))
    hits = [finding for finding in report.findings if finding.code == "LF115"]
    assert [finding.location.file for finding in hits] == ([found] if found else [])
    assert all("--dequantize" in finding.hint and words in finding.hint for finding in hits)
