"""What is not an adapter is refused by what it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import distributed_files
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from loraformat.cli import main
from loraformat.containers import open_bundle
from loraformat.errors import UnknownFormat
from loraformat.formats import detect

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER = FIXTURES / "good" / "peft" / "tiny-llama"
WEIGHTS = {"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.zeros(4)}
MOMENTS = {"state": {0: {"step": torch.zeros(1), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}


def said_of(path: Path) -> str:
    with pytest.raises(UnknownFormat) as told:
        detect(open_bundle(str(path)))
    assert told.value.where == str(path)
    return f"{told.value.message} ({told.value.hint})"


def gguf(kind: str) -> bytes:
    """The begin of a GGUF file of version 3 with one key."""
    key, value = b"general.type", kind.encode()
    return b"".join(
        (
            b"GGUF",
            struct.pack("<IQQ", 3, 0, 1),  # version, tensors, keys
            struct.pack("<Q", len(key)) + key,
            struct.pack("<IQ", 8, len(value)) + value,  # 8: a text
        )
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_a_full_model_is_named_with_its_class_and_first_tensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert "this is a full model: model.safetensors holds model.embed_tokens.weight" in said_of(tmp_path)
    assert "this is a full model" in said_of(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    assert "this is a full model (LlamaForCausalLM)" in said_of(tmp_path)
    assert "pass a model as BASE in merge BASE ADAPTER" in said_of(tmp_path)


def test_a_distributed_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    distributed_files.save(tmp_path, WEIGHTS)
    said = said_of(tmp_path)
    assert "a torch.distributed checkpoint without an adapter" in said
    assert "export" in said
    (tmp_path / ".metadata").unlink()
    assert "a torch.distributed checkpoint without .metadata" in said_of(tmp_path)


def test_a_checkpoint_of_megatron_in_zarr_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "metadata.json", {"sharded_backend": "zarr", "sharded_backend_version": 1})
    (tmp_path / "decoder.layers.mlp.linear_fc1.adapter.linear_in.weight").mkdir()
    assert "checkpoint stored by zarr, which is not supported" in said_of(tmp_path)


def test_a_full_model_is_told_by_its_weights_whatever_its_file_is_called(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "step_500.pt")
    assert "this is a full model" in said_of(tmp_path)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_gguf_model_is_named(tmp_path: Path, is_folder: bool) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf("model"))
    assert "this is a GGUF model " in said_of(tmp_path if is_folder else tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["optimizer.pt", "step_500.pt"])
def test_the_state_of_an_optimizer_is_named(tmp_path: Path, name: str) -> None:
    torch.save(MOMENTS, tmp_path / name)
    assert "this is the state of an optimizer" in said_of(tmp_path)


def test_a_diffusers_pipeline_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    assert "this is a diffusers pipeline (StableDiffusionPipeline)" in said_of(tmp_path)


def test_what_nobody_can_name_is_told_by_its_first_tensors(tmp_path: Path) -> None:
    torch.save({f"net.{number}.weight": torch.zeros(2, 2) for number in range(5)}, tmp_path / "net.pt")
    said = said_of(tmp_path)
    assert "no format fits" in said
    assert "found net.pt; net.pt holds net.0.weight, net.1.weight, net.2.weight and 2 more" in said


def test_names_of_strangers_are_shown_safely(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "\x1b[31m" + "x" * 10_000})
    said = said_of(tmp_path)
    assert "\x1b" not in said
    assert len(said) < 400


def test_exchanged_arguments_of_a_merge_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file(WEIGHTS, model / "model.safetensors")
    arguments = ["merge", str(ADAPTER), str(model), "-o", str(tmp_path / "out")]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 2
    assert f"{ADAPTER} is an adapter and {model} is a full model: are the arguments swapped?" in told.stderr
    assert not (tmp_path / "out").exists()


def test_a_pipeline_in_the_place_of_an_adapter_is_named(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    (pipe / "unet").mkdir(parents=True)
    write_json(pipe / "model_index.json", {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]})
    save_file(WEIGHTS, pipe / "unet" / "diffusion_pytorch_model.safetensors")
    style = tmp_path / "style.safetensors"
    save_file({f"lora_unet_conv_in.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}, style)
    assert (
        CliRunner().invoke(main, ["convert", str(style), "--to", "peft", "-o", str(tmp_path / "peft")]).exit_code == 0
    )
    for adapter in (style, tmp_path / "peft"):
        told = CliRunner().invoke(main, ["merge", str(adapter), str(pipe), "-o", str(tmp_path / "out")])
        assert told.exit_code == 2
        assert f"{adapter} is an adapter and {pipe} is a pipeline: are the arguments swapped?" in told.stderr
    told = CliRunner().invoke(main, ["merge", str(pipe), str(pipe), "-o", str(tmp_path / "out")])
    assert "pass a pipeline as BASE in merge BASE ADAPTER -o OUT" in told.stderr
    assert "exchanged" not in told.stderr
    assert not (tmp_path / "out").exists()


def test_a_weight_file_beside_its_config_is_taken_for_its_folder(tmp_path: Path) -> None:
    """The file alone would not say its alpha."""
    run = CliRunner().invoke
    source, base = str(FIXTURES / "minigpt" / "lora_adapter"), str(FIXTURES / "minigpt" / "base")
    folder = tmp_path / "adapter"
    assert run(main, ["convert", source, "--to", "peft", "--alpha", "1", "-o", str(folder)]).exit_code == 0
    weights = str(folder / "adapter_model.safetensors")
    assert json.loads(run(main, ["inspect", weights, "--format", "json"]).stdout)["format"] == "peft"
    for adapter, out in ((weights, "one"), (str(folder), "two")):
        assert run(main, ["convert", adapter, "--to", "native", "-o", str(tmp_path / f"{out}-native")]).exit_code == 0
        assert run(main, ["merge", base, adapter, "-o", str(tmp_path / out)]).exit_code == 0
    for name in ("one/model.pt", "one-native/lora_config.json", "one-native/lora_weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("one", "two")).read_bytes()
