"""Checkpoints in the names of the originals, merged, against merged pipelines, by diffusers' own converters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="make test-diffusers installs diffusers")

import numpy as np
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from test_pipelines import random
from tiny_pipelines import MODELS, model_of, of_size
from torch import Tensor

from loraformat.io import load_adapter, save_adapter
from loraformat.jobs.merge import merge
from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Dense, LowRank, Update
from loraformat.naming.families import DIFFUSERS, Module, family_named, spelled

pytestmark = [pytest.mark.diffusers, pytest.mark.filterwarnings("ignore")]

# Qwen-Image is absent: its checkpoints have the names of diffusers.
CONVERTERS = {
    **dict.fromkeys(("sd", "sdxl"), "convert_ldm_unet_checkpoint"),
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
}
# Tensors that belong to no module which an adapter changes: ends of names in diffusers → in the original.
REST = {
    "sd3": {"pos_embed.pos_embed": "pos_embed"},
    "wan": {"scale_shift_table": "modulation"},
}
# The converters of these do not take the prefix off; Lumina 2's tries, and fails.
WITHOUT_PREFIX = ("flux2", "hunyuan-video", "lumina2")
PREFIX = "model.diffusion_model."


def of_original(family: str, name: str) -> tuple[str, Module | None, int]:
    """What the original calls a tensor of the model, and which part of a module it is."""
    path, _, parameter = name.rpartition(".")
    place = family_named(family).find(spelled(path), DIFFUSERS)
    if place is not None:
        return f"{place.original}.{place.parameter(parameter)}", place.module, place.part or 0
    for end, original in REST.get(family, {}).items():
        if name == end:
            return ("head.modulation" if family == "wan" else original), None, 0
        if name.endswith(f".{end}"):
            return name.removesuffix(end) + original, None, 0
    return name, None, 0


def original_of(family: str, model: Any) -> dict[str, Tensor]:
    """Random tensors in the names and shapes of the original: a fused module is as large as its parts."""
    sizes: dict[str, dict[int, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        original, _, part = of_original(family, name)
        sizes.setdefault(original, {})[part] = tensor.shape
    return {
        name: torch.from_numpy(random(name, sum(shape[0] for shape in parts.values()), *parts[0][1:]))
        for name, parts in sizes.items()
    }


def converted(family: str, checkpoint: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The checkpoint in the names of diffusers, by diffusers."""
    convert = of_size(single_file_utils, CONVERTERS[family], family)
    found = convert(dict(checkpoint), config=dict(config))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def adapter_of(model: Any, family: str) -> Adapter:
    """Pairs for all layers; dense deltas for their biases and for the norms."""
    component, table = family_named(family).component, family_named(family)
    updates: dict[str, tuple[Update, ...]] = {}
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".")[0]
        if table.find(spelled(path), DIFFUSERS) is None:
            continue
        rows, *rest = tensor.shape
        if not rest:
            updates[f"{component}.{name}"] = (Dense(LazyTensor.of(random(f"{name}.d", rows)), 1.0),)
            continue
        up, down = random(f"{name}.B", rows, 2), random(f"{name}.A", 2, int(np.prod(rest)))
        pair = LowRank(LazyTensor.of(up), LazyTensor.of(down), 0.75, None, tuple(rest[1:]))
        updates[f"{component}.{name}"] = (pair,)
    pipeline = Pipeline(families=(family,), components=(component,))
    return Adapter(config=AdapterConfig(pipeline=pipeline), updates=dict(sorted(updates.items())))


def pipeline_with(folder: Path, family: str, model: Any) -> Path:
    """A pipeline of the one component."""
    component = family_named(family).component
    model.save_pretrained(folder / component)
    index = {"_class_name": "Pipeline", component: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dialect", ["lycoris", "comfy"])
@pytest.mark.parametrize("family", CONVERTERS)
def test_a_merged_checkpoint_converted_is_the_merged_pipeline(family: str, dialect: str, tmp_path: Path) -> None:
    model = model_of(family)
    original = original_of(family, model)
    model.load_state_dict(converted(family, prefixed(family, original), model.config), strict=True)
    base = pipeline_with(tmp_path / "base", family, model)
    vae = {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4)} if family not in WITHOUT_PREFIX else {}
    save_file(prefixed(family, original) | vae, tmp_path / "one.safetensors")
    adapter = adapter_of(model, family)
    save_adapter(adapter, tmp_path / "adapter", to=dialect)
    [file] = (tmp_path / "adapter").glob("*.safetensors")

    if dialect == "comfy" and family in ("flux", "flux2", "chroma"):
        assert any(name.endswith(".query_norm.scale.diff") for name in load_file(file))
    merge(base, [file], tmp_path / "pipeline", verify="full")
    report = merge(tmp_path / "one.safetensors", [file], tmp_path / "single", verify="full")
    assert report.data.tensors_touched == len(
        {of_original(family, name.partition(".")[2])[0] for name in adapter.updates}
    )
    merged = load_file(tmp_path / "single" / "one.safetensors")
    for name, tensor in vae.items():
        assert torch.equal(merged.pop(name), tensor)
    [weights] = (tmp_path / "pipeline" / family_named(family).component).glob("*.safetensors")
    wanted, found = load_file(weights), converted(family, merged, model.config)
    assert found.keys() == wanted.keys() == model.state_dict().keys()
    before = model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
        is_changed = f"{family_named(family).component}.{name}" in adapter.updates
        assert is_changed is not torch.equal(value, before[name]), name


def prefixed(family: str, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "" if family in WITHOUT_PREFIX else PREFIX
    return {f"{prefix}{name}": tensor for name, tensor in checkpoint.items()}


def test_every_family_that_diffusers_converts_is_here() -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    assert {name for name in MODELS if MODELS[name][0] in SINGLE_FILE_LOADABLE_CLASSES} - {"qwen-image"} == set(
        CONVERTERS
    )


HIDDEN = 8
# Checkpoint → (prefix, component, kohya's prefix, whether the names are OpenCLIP's).
ENCODERS = {
    "sd 1": [("cond_stage_model.transformer.", "text_encoder", "lora_te_", False)],
    "sd 2": [("cond_stage_model.model.", "text_encoder", "lora_te_", True)],
    "sdxl": [
        ("conditioner.embedders.0.transformer.", "text_encoder", "lora_te1_", False),
        ("conditioner.embedders.1.model.", "text_encoder_2", "lora_te2_", True),
    ],
    "refiner": [("conditioner.embedders.0.model.", "text_encoder_2", "lora_te2_", True)],
    "sd3": [
        ("text_encoders.clip_l.transformer.", "text_encoder", "lora_te1_", False),
        ("text_encoders.clip_g.transformer.", "text_encoder_2", "lora_te2_", False),
    ],
}
FAMILIES = {"sd 1": "sd", "sd 2": "sd", "sdxl": "sdxl", "refiner": "sdxl", "sd3": "sd3"}


def encoder(prefix: str, *, is_open_clip: bool) -> dict[str, Tensor]:
    """A text encoder of one layer in the names that a checkpoint has."""
    layer = "transformer.resblocks.0." if is_open_clip else "text_model.encoder.layers.0."
    names = {
        True: ("attn.out_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"),
        False: (
            *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
            "mlp.fc1",
            "mlp.fc2",
            "layer_norm1",
            "layer_norm2",
        ),
    }[is_open_clip]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        is_norm = "ln_" in name or "norm" in name
        wide = name.endswith(("c_fc", "fc1"))
        rows, cols = (4 * HIDDEN if wide else HIDDEN), (4 * HIDDEN if name.endswith(("mlp.c_proj", "fc2")) else HIDDEN)
        shapes |= {f"{layer}{name}.weight": (rows,) if is_norm else (rows, cols), f"{layer}{name}.bias": (rows,)}
    if is_open_clip:
        shapes |= {f"{layer}attn.in_proj_weight": (3 * HIDDEN, HIDDEN), f"{layer}attn.in_proj_bias": (3 * HIDDEN,)}
        shapes |= {"text_projection": (HIDDEN, HIDDEN), "positional_embedding": (4, HIDDEN)}
    return {prefix + name: torch.from_numpy(random(prefix + name, *shape)) for name, shape in shapes.items()}


def converted_encoder(prefix: str, checkpoint: Mapping[str, Tensor], *, is_open_clip: bool) -> dict[str, Tensor]:
    if is_open_clip:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN))
        return dict(single_file_utils.convert_open_clip_checkpoint(model, dict(checkpoint), prefix=prefix))
    return dict(single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint), prefix))


def kohya_encoders(kind: str, *, leaves: tuple[str, ...]) -> dict[str, Tensor]:
    """Pairs of some layers of all encoders of a checkpoint, in kohya's names; each module has a scale of its own."""
    tensors: dict[str, Tensor] = {}
    for number, (_, _, prefix, _) in enumerate(ENCODERS[kind]):
        for place, leaf in enumerate(leaves):
            rows, cols = (4 * HIDDEN if leaf == "mlp_fc1" else HIDDEN), (4 * HIDDEN if leaf == "mlp_fc2" else HIDDEN)
            module = f"{prefix}text_model_encoder_layers_0_{leaf}"
            tensors[f"{module}.lora_down.weight"] = torch.from_numpy(random(f"{module}.A", 2, cols))
            tensors[f"{module}.lora_up.weight"] = torch.from_numpy(random(f"{module}.B", rows, 2))
            tensors[f"{module}.alpha"] = torch.tensor(1.0 + number + place)
    return tensors


@pytest.mark.parametrize(
    "leaves",
    [
        ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"),
        ("self_attn_k_proj",),
    ],
)
@pytest.mark.parametrize("kind", ENCODERS)
def test_text_encoders_of_a_merged_checkpoint_are_those_of_the_merged_pipeline(
    kind: str, leaves: tuple[str, ...], tmp_path: Path
) -> None:
    """OpenCLIP joins query, key and value, also where an adapter changes one of them."""
    family = FAMILIES[kind]
    model = model_of(family)
    single = prefixed(family, original_of(family, model))
    base = tmp_path / "base"
    index = {"_class_name": "Pipeline", family_named(family).component: ["diffusers", type(model).__name__]}
    for prefix, component, _, is_open_clip in ENCODERS[kind]:
        weights = encoder(prefix, is_open_clip=is_open_clip)
        single |= weights
        (base / component).mkdir(parents=True)
        parts = converted_encoder(prefix, weights, is_open_clip=is_open_clip)
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, base / component / "model.safetensors")
        (base / component / "config.json").write_text("{}")
        index[component] = ["transformers", "CLIPTextModel"]
    model.save_pretrained(base / family_named(family).component)
    (base / "model_index.json").write_text(json.dumps(index))
    save_file(single, tmp_path / "one.safetensors")
    save_file(kohya_encoders(kind, leaves=leaves), tmp_path / "style.safetensors")

    merge(base, [tmp_path / "style.safetensors"], tmp_path / "pipeline", verify="full")
    report = merge(tmp_path / "one.safetensors", [tmp_path / "style.safetensors"], tmp_path / "single", verify="full")
    assert report.data.adapters[0].applied == report.data.adapters[0].modules
    merged = load_file(tmp_path / "single" / "one.safetensors")
    for prefix, component, _, is_open_clip in ENCODERS[kind]:
        own = {name: tensor for name, tensor in merged.items() if name.startswith(prefix)}
        found = converted_encoder(prefix, own, is_open_clip=is_open_clip)
        wanted = load_file(tmp_path / "pipeline" / component / "model.safetensors")
        before = load_file(base / component / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
        assert sum(not torch.equal(wanted[name], before[name]) for name in wanted) == len(leaves)
    untouched = {name for name in single if not name.startswith(tuple(prefix for prefix, *_ in ENCODERS[kind]))}
    assert all(torch.equal(merged[name], single[name]) for name in untouched)
    # A strength of one encoder, in the pipeline and in the one file.
    strengths = {ENCODERS[kind][0][1]: 0.25}
    for name, target in (("base", "pipeline-weak"), ("one.safetensors", "single-weak")):
        merge(
            tmp_path / name,
            [tmp_path / "style.safetensors"],
            tmp_path / target,
            component_strengths=strengths,
            verify="full",
        )
    weak = load_file(tmp_path / "single-weak" / "one.safetensors")
    for prefix, component, _, is_open_clip in ENCODERS[kind]:
        own = {name: tensor for name, tensor in weak.items() if name.startswith(prefix)}
        found = converted_encoder(prefix, own, is_open_clip=is_open_clip)
        for name, value in load_file(tmp_path / "pipeline-weak" / component / "model.safetensors").items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    # And back: read for the checkpoint, written in the names of a pipeline.
    adapter = load_adapter(tmp_path / "style.safetensors", base=tmp_path / "one.safetensors")
    save_adapter(adapter, tmp_path / "back", to="diffusers")
    again = load_adapter(tmp_path / "back")
    assert {name.partition(".")[0] for name in again.updates} == {component for _, component, *_ in ENCODERS[kind]}
