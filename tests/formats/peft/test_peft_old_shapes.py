"""Factors of PEFT in shapes and types that are rare: 8 bits, joined layers of PEFT 0.2, convolutions in groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_architectures_against_peft import GPT

import loraformat
from loraformat.errors import AdapterRefused, ConfigError, UnsupportedUpdate
from loraformat.io import open_adapter


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_eight_bits_are_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    both = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(tensors, path)
    with torch.no_grad():
        for name, value in both.named_parameters():
            stored = tensors.get(name.replace(".default", ""))
            if stored is not None:
                value.copy_(stored.float())
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def joined(folder: Path, enabled: list[bool], rows: int) -> dict[str, torch.Tensor]:
    """GPT-2 and the factors that PEFT 0.2 saved for c_attn; what they add, as PEFT 0.2 computes it."""
    model = tiny.build("GPT2LMHeadModel", "GPT2Config", GPT)
    model.save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "fan_in_fan_out": True, "enable_lora": enabled}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    torch.manual_seed(2)
    a, b = torch.randn(2 * sum(enabled), 16), torch.randn(rows, 2, 1)
    name = "base_model.model.transformer.h.0.attn.c_attn"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter" / "adapter_model.safetensors"
    )
    product = torch.nn.functional.conv1d(a.unsqueeze(0), b, groups=sum(enabled)).squeeze(0)
    whole = torch.zeros(48, 16)
    whole.view(3, 16, 16)[torch.tensor(enabled)] = product.view(sum(enabled), 16, 16)
    return {"transformer.h.0.attn.c_attn.weight": (whole * 3).T}


def test_a_joined_layer_of_peft_0_2_is_merged(tmp_path: Path) -> None:
    added = joined(tmp_path, [True, False, True], 32)
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    before, after = (load_file(tmp_path / kind / "model.safetensors") for kind in ("base", "out"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + added.get(name, 0), atol=1e-5, rtol=1e-5)


def test_parts_that_enable_lora_does_not_name_are_refused(tmp_path: Path) -> None:
    joined(tmp_path, [True, False, True], 32)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "enable_lora": [True, True, True]}))
    with pytest.raises(ConfigError, match="the 3 parts that enable_lora names"):
        open_adapter(str(tmp_path / "adapter"))


def convolution(folder: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    (folder / "base").mkdir()
    save_file({"stem.conv1d.weight": torch.randn(32, 1, 4)}, folder / "base" / "model.safetensors")
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["conv1d"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.randn(a), "lora_B": torch.randn(b)}
    names = {f"base_model.model.stem.conv1d.{side}.weight": value for side, value in factors.items()}
    save_file(names, folder / "adapter" / "adapter_model.safetensors")


def test_an_update_of_all_inputs_for_a_depthwise_convolution_is_refused_as_one(tmp_path: Path) -> None:
    convolution(tmp_path, (4, 32, 4), (32, 4, 1))
    with pytest.raises(AdapterRefused) as caught:
        loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert "grouped (depthwise) convolution" in caught.value.hint


def test_factors_of_a_convolution_in_groups_are_refused_as_such(tmp_path: Path) -> None:
    convolution(tmp_path, (4, 1, 4), (32, 2, 1))
    with pytest.raises(UnsupportedUpdate, match="grouped"):
        open_adapter(str(tmp_path / "adapter"))


def test_an_adapter_on_a_base_that_was_saved_with_adapters_goes_to_its_base_layer(tmp_path: Path) -> None:
    both: Any = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "base" / "model.safetensors"
    before = load_file(path)
    name = "model.layers.0.self_attn.q_proj"
    wrapped = {key.replace("q_proj.weight", "q_proj.base_layer.weight"): value for key, value in before.items()}
    own = {f"{name}.lora_A.speech.weight": torch.randn(2, 16), f"{name}.lora_B.speech.weight": torch.randn(16, 2)}
    save_file({**wrapped, **own}, path, metadata={"format": "pt"})
    loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"), verify="full")
    after = load_file(tmp_path / "out" / "model.safetensors")
    merged = both.merge_and_unload().state_dict()
    torch.testing.assert_close(after[f"{name}.base_layer.weight"], merged[f"{name}.weight"], atol=1e-5, rtol=0)
    assert all(torch.equal(after[key], value) for key, value in own.items())


def test_a_variant_beside_the_weights_is_not_read_with_them(tmp_path: Path) -> None:
    both = tiny.adapted(tiny.llama(), tmp_path, target_modules=["q_proj"])
    half = {name: value.half() for name, value in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(half, tmp_path / "base" / "model.fp16.safetensors")
    report = loraformat.merge(str(tmp_path / "base"), [str(tmp_path / "adapter")], str(tmp_path / "out"))
    assert any("model.fp16.safetensors" in finding.message for finding in report.findings if finding.code == "LF802")
    tiny.check_merged(tmp_path / "out", "LlamaForCausalLM", both)


def test_an_adapter_in_pickled_parts_is_read(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(4)
    factors = {
        "base_model.model.m.q.lora_A.weight": torch.randn(2, 4, generator=g),
        "base_model.model.m.q.lora_B.weight": torch.randn(6, 2, generator=g),
    }
    for number, (name, value) in enumerate(factors.items(), 1):
        torch.save({name: value}, tmp_path / f"adapter_model-{number:05}-of-00002.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (update,) = loraformat.load_adapter(tmp_path).updates["m.q.weight"]
    assert isinstance(update, loraformat.LowRank)
    assert torch.equal(update.up.torch(), factors["base_model.model.m.q.lora_B.weight"])
