"""`validate --target diffusers` says of a file what diffusers does with it: loads all, a part, nothing, or raises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="make test-diffusers installs diffusers")

import torch
from safetensors.torch import save_file
from tiny_pipelines import MODELS, model_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import derive_diffusers as upstream

from loraformat.jobs.validate import validate

pytestmark = [pytest.mark.diffusers, pytest.mark.filterwarnings("ignore")]

# Spellings of real trainers: kohya's scripts and musubi-tuner, ComfyUI and ai-toolkit, diffusers, OneTrainer, LyCORIS.
SPELLINGS = (
    *("COMPONENT. diffusers lora_A", "lora_unet_ KOHYA lora_down alpha", "diffusion_model. COMFY lora_A"),
    *("diffusion_model. COMFY lora_A alpha", "diffusion_model. COMFY lora_down alpha"),
    *("lora_transformer_ diffusers lora_down alpha", "lycoris_ diffusers hada alpha", "bare diffusers lora_A"),
)


def spelling_of(family: str, text: str) -> upstream.Spelling:
    table = upstream.family_named(family)
    prefix, naming, tensors, *extras = text.replace("COMPONENT", table.component).split()
    naming = {"KOHYA": table.kohya, "COMFY": table.comfy}.get(naming, naming)
    return upstream.Spelling("" if prefix == "bare" else prefix, naming, tensors, tuple(extras))


def attention_and_ends(layers: list[upstream.Layer]) -> list[upstream.Layer]:
    """What people train: attention of all blocks; and what stands outside of blocks."""
    return [
        layer
        for layer in layers
        if any(word in layer.place.original for word in ("attn", "attention", "linear1")) or not layer.place.numbers
    ]


def done(family: str, file: upstream.File) -> str:
    """What diffusers does with a file."""
    found = upstream.outcome_of(family, model_of(family), file)
    if found.error:
        return "refuses"
    if not found.loaded:
        return "loads nothing"
    parts = "loads a part" if found.loaded < set(file.deltas) else "loads all"
    return f"{parts}, misreads" if found.wrong else parts


def said(file: upstream.File, folder: Path) -> str:
    """What our verdict amounts to."""
    save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, folder / "lora.safetensors")
    report = validate(folder / "lora.safetensors", target=["diffusers"])
    found = {one.code: one.message for one in report.findings if one.code.startswith("LF6")}
    assert "LF625" not in found, found
    if "LF622" in found:
        return "refuses" if "refuses" in found["LF622"] else "loads nothing"
    parts = "loads a part" if "LF623" in found else "loads all"
    return f"{parts}, misreads" if "LF624" in found else parts


@pytest.mark.parametrize("text", SPELLINGS)
@pytest.mark.parametrize("family", MODELS)
def test_the_verdict_is_what_diffusers_does(family: str, text: str, tmp_path: Path) -> None:
    """Of the layers that people train, which the table was not made of."""
    layers = attention_and_ends(upstream.layers_of(family, model_of(family)))
    assert len(layers) > 3
    file = upstream.File(spelling_of(family, text), layers)
    assert said(file, tmp_path) == done(family, file)


@pytest.mark.parametrize("family", ["flux", "wan", "z-image", "sdxl"])
def test_the_verdict_of_one_layer_is_what_diffusers_does(family: str, tmp_path: Path) -> None:
    layers = [layer for layer in upstream.layers_of(family, model_of(family)) if layer.place.numbers[:1] == ("1",)][:1]
    file = upstream.File(spelling_of(family, "lora_unet_ KOHYA lora_down alpha"), layers)
    assert said(file, tmp_path) == done(family, file)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        *(
            ("sd", "lora_te_"),
            ("sdxl", "lora_te1_"),
            ("sdxl", "lora_te2_"),
            ("sd3", "lora_te1_"),
            ("flux", "lora_te1_"),
        ),
        *((family, "text_encoders.clip_l.transformer.") for family in ("sdxl", "sd3", "flux")),
    ],
)
def test_text_encoders_are_said_to_be_loaded_where_they_are(family: str, prefix: str, tmp_path: Path) -> None:
    model = model_of(family)
    is_flat = prefix.endswith("_")
    text = "lora_unet_ KOHYA lora_down alpha" if is_flat else "diffusion_model. COMFY lora_down alpha"
    layers = attention_and_ends(upstream.layers_of(family, model))
    # diffusers' reader of FLUX.1 leaves the ends out, which is another finding
    layers = [layer for layer in layers if layer.place.numbers] if family == "flux" else layers
    tensors = upstream.File(spelling_of(family, text), layers).tensors
    for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer = f"text_model.encoder.layers.0.self_attn.{leaf}"
        stem = prefix + (layer.replace(".", "_") if is_flat else layer)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, upstream.HIDDEN)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(upstream.HIDDEN, 2)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    loaded = upstream.loaded_encoders(family, model, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    report = validate(tmp_path / "lora.safetensors", target=["diffusers"])
    left_out = [one for one in report.findings if one.code in ("LF622", "LF623")]
    assert not [one for one in report.findings if one.code < "LF6"]
    assert bool(loaded) is not bool(left_out), (loaded, left_out)


def test_the_table_is_of_the_installed_diffusers() -> None:
    import diffusers

    table = upstream.json.loads(upstream.TABLE.read_text(encoding="utf-8"))
    assert table["version"] == diffusers.__version__
    assert set(table["families"]) == set(MODELS)
