"""Adapters that torchtune exported, with the base that decides whether the export is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.errors import AdapterRefused
from loraformat.jobs.merge import merge
from loraformat.jobs.validate import validate
from loraformat.model.assumptions import Assumptions

HEADS = {"num_attention_heads": 2, "hidden_size": 8}
_SHAPES = {"a": (2, 8), "b": (8, 2)}
PREFIX = "base_model.model.model.layers.0.self_attn"


def exported(folder: Path, *, with_own_file: bool = True, dora: bool = False) -> str:
    """What torchtune's checkpointer leaves: PEFT's files, and its own beside them."""
    folder.mkdir()
    tensors = {}
    for name in ("q_proj", "v_proj"):
        tensors[f"{PREFIX}.{name}.lora_A.weight"] = torch.randn(2, 8)
        tensors[f"{PREFIX}.{name}.lora_B.weight"] = torch.randn(8, 2)
        if dora:
            tensors[f"{PREFIX}.{name}.lora_magnitude_vector"] = torch.rand(8) + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    if with_own_file:
        own = {f"layers.0.attn.q_proj.lora_{part}.weight": torch.randn(2, 2) for part in "ab"}
        torch.save(own, folder / "adapter_model.pt")
    return str(folder)


def base(folder: Path, model_type: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **HEADS}))
    names = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    save_file({name: torch.randn(8, 8) for name in names}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("model_type", "dora", "is_wrong"), [("llama", False, False), ("qwen2", False, True), ("llama", True, True)]
)
def test_the_base_decides_whether_the_export_is_right(
    tmp_path: Path, model_type: str, dora: bool, is_wrong: bool
) -> None:
    change, model = exported(tmp_path / "a", dora=dora), base(tmp_path / "b", model_type)
    found = {one.code for one in validate(change, base=model, format="peft").findings}
    assert ("LF243" in found) == is_wrong


@pytest.mark.parametrize(("model_type", "order"), [("llama", [0, 2, 1, 3, 4, 6, 5, 7]), ("qwen2", list(range(8)))])
def test_a_merge_reads_torchtune_s_own_file_and_not_the_export(
    tmp_path: Path, model_type: str, order: list[int]
) -> None:
    change, model = exported(tmp_path / "a"), base(tmp_path / "b", model_type)
    factors = {f"layers.0.attn.q_proj.lora_{part}.weight": torch.randn(*shape) for part, shape in _SHAPES.items()}
    torch.save(factors, Path(change) / "adapter_model.pt")
    merge(model, [change], str(tmp_path / "out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(path / "model.safetensors")[name] for path in (Path(model), tmp_path / "out"))
    a, b = (factors[f"layers.0.attn.q_proj.lora_{part}.weight"].double() for part in "ab")
    torch.testing.assert_close(after.double(), before.double() + 2 * (b @ a)[order], rtol=1e-6, atol=1e-6)


def test_without_a_base_it_is_not_known(tmp_path: Path) -> None:
    assert "LF243" in {one.code for one in validate(exported(tmp_path / "a"), format="peft").findings}
    assert "LF243" not in {one.code for one in validate(exported(tmp_path / "b", with_own_file=False)).findings}


def test_whole_weights_under_the_name_of_an_adapter_are_not_merged(tmp_path: Path) -> None:
    change, model = exported(tmp_path / "a", with_own_file=False), base(tmp_path / "b", "llama")
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
    save_file(weights, Path(change) / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="LF231"):
        merge(model, [change], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    merge(model, [change], str(tmp_path / "out"), force=True)


@pytest.mark.parametrize("layers", [99999999, [0, 99999999]])
def test_layers_that_no_model_has_are_named(tmp_path: Path, layers: object) -> None:
    change = Path(exported(tmp_path / "a", with_own_file=False))
    config = json.loads((change / "adapter_config.json").read_text())
    config["layers_to_transform"] = layers
    (change / "adapter_config.json").write_text(json.dumps(config))
    assert "99999999" in " ".join(one.message for one in validate(str(change)).findings)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_folder_in_the_place_of_a_tokenizer_file_is_named(tmp_path: Path, name: str) -> None:
    change = Path(exported(tmp_path / "a", with_own_file=False))
    (change / name).mkdir()
    found = [(one.where, one.message) for one in validate(str(change)).findings if one.code == "LF511"]
    assert found == [(name, "expected a file, found a folder")]


@pytest.mark.parametrize(("assumed", "factor"), [(None, 16.0), (8.0, 8.0)])
def test_the_scale_of_an_old_mlx_vlm_adapter_is_the_caller_s_to_choose(
    tmp_path: Path, assumed: float | None, factor: float
) -> None:
    """Also for the check of what was written, which has a formula of its own."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 16, "dropout": 0}))
    a, b = torch.randn(8, 2), torch.randn(2, 8)
    module = "model.layers.0.self_attn.q_proj"
    save_file({f"{module}.A": a, f"{module}.B": b}, folder / "adapters.safetensors")
    model = base(tmp_path / "b", "llama")
    report = merge(model, [str(folder)], str(tmp_path / "out"), assumptions=Assumptions(scale=assumed), verify="full")
    assert ("LF244" in {one.code for one in report.findings}) == (assumed is None)
    before, after = (
        load_file(Path(path) / "model.safetensors")[f"{module}.weight"] for path in (model, tmp_path / "out")
    )
    assert torch.allclose(after - before, factor * (a @ b).T, atol=1e-4)
