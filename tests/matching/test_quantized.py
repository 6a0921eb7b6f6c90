"""Quantized bases are named by their scheme, and nobody else is blamed for what they look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.errors import UnsupportedUpdate, UsageError
from loraformat.jobs.merge import merge
from loraformat.jobs.validate import validate
from loraformat.matching import quantization_of, quantized_weights

MODULE = "model.layers.0.self_attn.q_proj"
CODES = torch.zeros(128, 1, dtype=torch.uint8)
INT32 = torch.zeros(2, 16, dtype=torch.int32)
SCALES = torch.ones(1, 16)
FP8 = torch.zeros(16, 16).to(torch.float8_e4m3fn)

# What is in the folder → the scheme that is named. The layouts are those of the libraries, see matching/quantized.py.
SCHEMES: dict[str, tuple[dict[str, object], dict[str, object], dict[str, Tensor]]] = {
    "hqq": ({"quant_method": "hqq"}, {}, {".W_q": CODES}),
    "HQQ": ({}, {}, {".W_q": CODES}),
    "quanto": ({"quant_method": "quanto"}, {}, {".weight": CODES.view(16, 8)}),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, {}, {".weight": FP8, ".weight_scale": SCALES}),
    "auto-round 4 bits": ({"quant_method": "auto-round", "bits": 4}, {}, {".qweight": INT32, ".scales": SCALES}),
    "bitsandbytes NF4": ({}, {}, {".weight": CODES, ".weight.quant_state.bitsandbytes__nf4": CODES}),
    "bitsandbytes, 8 bits": ({}, {}, {".weight": CODES.view(16, 8).to(torch.int8), ".SCB": torch.ones(16)}),
    "GPTQ or AWQ": ({}, {}, {".qweight": INT32, ".scales": SCALES}),
    "block FP8": ({}, {}, {".weight": FP8, ".weight_scale_inv": torch.ones(1, 1)}),
    "modelopt NVFP4": ({}, {}, {".weight": CODES.view(16, 8), ".weight_scale_2": torch.ones(())}),
    "compressed-tensors": ({}, {}, {".weight_packed": INT32}),
}


def base(folder: Path, scheme: str) -> Path:
    settings, files, tensors = SCHEMES[scheme]
    folder.mkdir()
    config: dict[str, object] = {"model_type": "llama", **({"quantization_config": settings} if settings else {})}
    for name, value in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(value))
    dense = {"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 16)}
    save_file({f"{MODULE}{end}": value.clone() for end, value in tensors.items()} | dense, folder / "model.safetensors")
    return folder


def adapter(folder: Path, module: str = MODULE) -> Path:
    folder.mkdir()
    tensors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    named = {f"base_model.model.{module}.{name}.weight": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_is_named_and_the_adapter_is_not_blamed(tmp_path: Path, scheme: str) -> None:
    report = validate(str(adapter(tmp_path / "a")), base=str(base(tmp_path / "b", scheme)))
    messages = {finding.code: finding.message for finding in report.findings}
    assert not {"LF301", "LF302"} & messages.keys()
    assert scheme in messages["LF309"]
    assert "1 quantized weight of the adapter was not compared" in messages["LF309"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("module", [MODULE, MODULE.removeprefix("model."), f"language_model.{MODULE}"])
def test_a_merge_into_codes_is_refused_by_the_name_of_the_scheme(tmp_path: Path, scheme: str, module: str) -> None:
    change = str(adapter(tmp_path / "a", module))
    with pytest.raises(UnsupportedUpdate, match=scheme):
        merge(str(base(tmp_path / "b", scheme)), [change], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_stay_dense_are_merged_as_ever(tmp_path: Path, scheme: str) -> None:
    change = adapter(tmp_path / "a", "model.layers.0.self_attn.k_proj")
    merge(str(base(tmp_path / "b", scheme)), [str(change)], str(tmp_path / "out"))
    merged = open_checkpoint(str(tmp_path / "out")).weights["model.layers.0.self_attn.k_proj.weight"].read(0, 16)
    assert np.array_equal(merged, np.full((16, 16), 2.0))


def test_a_dense_weight_beside_a_quantized_one_of_the_same_end_is_dense(tmp_path: Path) -> None:
    """The tower of a vision-language model stays dense where its language model is quantized."""
    folder = base(tmp_path / "b", "GPTQ or AWQ")
    save_file({"vision.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, folder / "model-2.safetensors")
    checkpoint = open_checkpoint(str(folder))
    names = ["vision.layers.0.self_attn.q_proj.weight", f"{MODULE}.weight"]
    assert quantized_weights(checkpoint, names) == {f"{MODULE}.weight"}


def test_a_dense_base_is_not_quantized(tmp_path: Path) -> None:
    """Nor is one whose config says that nothing was done."""
    folder = tmp_path / "b"
    folder.mkdir()
    save_file({f"{MODULE}.weight": torch.zeros(4, 4), "m.res_blocks": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    checkpoint = open_checkpoint(str(folder))
    assert quantization_of(checkpoint) is None
    assert quantized_weights(checkpoint, [f"{MODULE}.weight"]) == frozenset()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "hqq"}}}),
        ("quantize_config.json", {"bits": 4, "group_size": 128}),
    ],
)
def test_settings_that_were_left_over_quantize_nothing(tmp_path: Path, file: str, settings: dict[str, object]) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    save_file({f"{MODULE}.weight": torch.zeros(16, 16)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / file).write_text(json.dumps(settings))
    change = str(adapter(tmp_path / "a"))
    (finding,) = (one for one in validate(change, base=str(folder)).findings if one.code in ("LF309", "LF312"))
    assert (finding.code, finding.location.file) == ("LF312", file)
    with pytest.raises(UsageError, match="not quantized") as error:
        loraformat.dequantize(str(folder), str(tmp_path / "out"))
    assert file in str(error.value.hint)
    merge(str(folder), [change], str(tmp_path / "out"))
    merged = open_checkpoint(str(tmp_path / "out")).weights[f"{MODULE}.weight"].read(0, 16)
    assert np.array_equal(merged, np.full((16, 16), 2.0))
