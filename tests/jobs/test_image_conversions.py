"""convert, inspect and validate of image adapters, with a pipeline as the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.io import load_adapter
from loraformat.jobs.convert import convert
from loraformat.jobs.diff import diff
from loraformat.jobs.inputs.discovery import discover
from loraformat.jobs.inspect import View, inspect
from loraformat.jobs.validate import validate

GOOD = Path(__file__).parents[2] / "fixtures" / "good"
FLUX = GOOD / "kohya" / "tiny-flux"
BLOCK = "transformer_blocks.0"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of diffusers whose components have the weights of the fixture."""
    folder = tmp_path / "pipeline"
    weights = {
        "transformer": {
            **{f"{BLOCK}.attn.to_{part}.weight": torch.ones(8, 8) for part in "qkv"},
            f"{BLOCK}.ff.net.0.proj.weight": torch.ones(32, 8),
        },
        "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)},
    }
    for component, tensors in weights.items():
        (folder / component).mkdir(parents=True)
        name = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(tensors, folder / component / name)
    (folder / "scheduler").mkdir()
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "X"], "text_encoder": ["transformers", "X"]}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("target", ["diffusers", "kohya", "comfy", "lycoris", "peft"])
def test_a_conversion_with_a_pipeline_comes_back_bit_for_bit(target: str, pipeline: Path, tmp_path: Path) -> None:
    report = convert(FLUX, tmp_path / "out", to=target, base=pipeline, check_roundtrip=True)
    assert (report.data.roundtrip.weights, report.data.roundtrip.exact) == (5, 5)


def test_folders_of_components_are_one_adapter(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(FLUX, out, to="peft", base=pipeline)
    assert sorted(path.name for path in out.iterdir()) == ["text_encoder", "transformer"]
    assert discover([str(out)]).adapters == (str(out),)
    assert inspect(out).summary.components == {"text_encoder": 1, "transformer": 4}
    assert validate(out, base=pipeline).ok
    assert diff(FLUX, out).data.has_equal_values
    convert(out, tmp_path / "back", to="kohya", base=pipeline)
    # Parts of a fused module that no longer share `down` become blocks: the same sums, in another order.
    assert diff(FLUX, tmp_path / "back", tolerance=1e-12).data.has_equal_values
    convert(FLUX, out, to="peft", base=pipeline, overwrite=True)
    assert load_adapter(out).component_of("transformer.transformer_blocks.0.attn.to_q.weight") == "transformer"


def test_a_config_of_a_component_is_judged(tmp_path: Path) -> None:
    convert(FLUX, tmp_path / "out", to="peft")
    config = tmp_path / "out" / "transformer" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout"', '"r": "2", "lora_dropout"'))
    assert not validate(tmp_path / "out").ok


def test_a_weight_that_the_pipeline_lacks_is_an_error(pipeline: Path, tmp_path: Path) -> None:
    save_file(
        {f"{BLOCK}.attn.to_q.weight": torch.ones(8, 8)},
        pipeline / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    assert "LF301" in {finding.code for finding in validate(FLUX, base=pipeline).findings}


def test_a_component_that_the_pipeline_lacks_is_named_once(tmp_path: Path) -> None:
    """And a projection of the U-Net called proj_out is not tied to the embeddings of the text encoder."""
    folder, style = tmp_path / "pipeline", tmp_path / "style.safetensors"
    (folder / "text_encoder").mkdir(parents=True)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    weights = {"text_model.embeddings.token_embedding.weight": torch.ones(9, 8), f"{layer}.weight": torch.ones(8, 8)}
    save_file(weights, folder / "text_encoder" / "model.safetensors")
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    attention = "lora_unet_down_blocks_0_attentions_0"
    modules = (
        f"lora_te_{layer.replace('.', '_')}",
        f"{attention}_proj_out",
        f"{attention}_transformer_blocks_0_attn1_to_q",
    )
    sides = {"down": (2, 8), "up": (8, 2)}
    save_file({f"{m}.lora_{side}.weight": torch.ones(shape) for m in modules for side, shape in sides.items()}, style)
    report = validate(style, base=folder)
    found = [finding for finding in report.findings if finding.code in ("LF301", "LF302", "LF308")]
    assert [(finding.code, finding.where) for finding in found] == [("LF301", "unet")]
    assert "2 updates" in found[0].message
    assert found[0].hint == "components with weights: text_encoder"


def test_norms_are_measured_against_a_pipeline(pipeline: Path) -> None:
    report = inspect(FLUX, base=pipeline, norms=True)
    assert report.data.total_relative_norm is not None
    assert (report.summary.family, report.summary.components) == ("flux", {"text_encoder": 1, "transformer": 4})


def test_the_header_is_shown_without_paths_unless_asked(tmp_path: Path) -> None:
    tensors = {f"lora_unet_conv_in.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    tags = {"10_cat": {"cat": 7, "sitting": 2}}
    header = {
        "ss_sd_model_name": "C:\\Users\\jane\\sd15.safetensors",
        "ss_resolution": "(512, 512)",
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": "/home/jane/cats",
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    report = inspect(tmp_path / "x.safetensors")
    assert report.data.training == {
        "checkpoint": "sd15.safetensors",
        "resolution": "(512, 512)",
        "tags": "cat (7), sitting (2)",
    }
    assert "jane" not in str(report)
    assert "jane" not in json.dumps(report.data.training)
    assert "jane" in str(inspect(tmp_path / "x.safetensors", view=View(metadata=True)))


def test_the_notes_of_a_trainer_go_along_but_for_what_binds_to_the_bytes(tmp_path: Path) -> None:
    tensors = {f"lora_unet_conv_in.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    header = {"ss_resolution": "512", "sshs_model_hash": "ab", "modelspec.hash_sha256": "cd", "ss_network_alpha": "9"}
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    report = convert(tmp_path / "x.safetensors", tmp_path / "out", to="comfy")
    [loss] = [finding for finding in report.findings if finding.code == "LF703"]
    assert "sshs_model_hash" in loss.message
    raw = load_adapter(tmp_path / "out").config.raw
    assert raw["ss_resolution"] == "512"
    assert raw["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & raw.keys()
