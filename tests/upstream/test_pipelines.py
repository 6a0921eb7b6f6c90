"""diffusers loads what is written: tiny random models through `load_lora_weights`, their outputs before and after."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="make test-diffusers installs diffusers")

import numpy as np
import torch
from tiny_pipelines import MODELS, model_of, pipeline_of, step

from loraformat.io import load_adapter, save_adapter
from loraformat.jobs.merge import merge
from loraformat.model.adapter import Adapter, AdapterConfig, Pipeline
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import Kronecker, LowRank, Magnitude, Update
from loraformat.naming.families import DIFFUSERS, family_named, spelled

pytestmark = [pytest.mark.diffusers, pytest.mark.filterwarnings("ignore")]

# What diffusers reads right of each family beside its own files. It refuses alpha in HunyuanVideo, SD3's original
# names, and drops all of Chroma's; of FLUX.1 and FLUX.2 it reads the blocks right, not the ends; of Lumina 2 it splits
# modules of one size alone.
READ = {
    "kohya": ("sd", "sdxl", "flux", "flux2", "qwen-image", "wan", "z-image"),
    "comfy": ("flux2", "qwen-image", "wan", "z-image"),
}
ENDS = (
    "double_stream",
    "single_stream",
    "x_embedder",
    "context_embedder",
    "norm_out",
    "proj_out",
    "time_text_embed",
    "time_guidance_embed",
    "condition",
)


def random(name: str, *shape: int) -> np.ndarray:
    seed = sum(position * byte for position, byte in enumerate(name.encode(), 1))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3


def layers(model: Any, family: str, *, only_blocks: bool) -> dict[str, torch.nn.Module]:
    """The linear layers and convolutions of a model that the table has."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and family_named(family).find(spelled(name), DIFFUSERS) is not None
    }
    return {name: each for name, each in found.items() if not (only_blocks and name.startswith(ENDS))}


def adapter_for(model: Any, family: str, *, scale: float, only_blocks: bool, dora: bool = False) -> Adapter:
    updates: dict[str, tuple[Update, ...]] = {}
    component = family_named(family).component
    for name, layer in layers(model, family, only_blocks=only_blocks).items():
        rows, cols, *kernel = layer.weight.shape
        up, down = random(f"{name}.B", rows, 2), random(f"{name}.A", 2, cols * int(np.prod(kernel or [1])))
        magnitude = Magnitude(LazyTensor.of(np.abs(random(f"{name}.m", rows)) + 0.5)) if dora else None
        pair = LowRank(LazyTensor.of(up), LazyTensor.of(down), scale, magnitude, tuple(kernel))
        updates[f"{component}.{name}.weight"] = (pair,)
    pipeline = Pipeline(families=(family,), components=(component,))
    return Adapter(config=AdapterConfig(pipeline=pipeline), updates=dict(sorted(updates.items())))


def changed(model: Any, adapter: Adapter) -> Any:
    """The model with every update in its weights, in float64 by torch."""
    found = copy.deepcopy(model)
    weights = dict(found.named_parameters())
    for weight, (update,) in adapter.updates.items():
        parameter = weights[weight.partition(".")[2]]
        assert isinstance(update, (LowRank, Kronecker))
        if isinstance(update, Kronecker):
            left, right = (torch.from_numpy(side[0].load()).double() for side in (update.left, update.right))
            delta = torch.kron(left, right) * update.scale
        else:
            delta = torch.from_numpy(update.up.load()).double() @ torch.from_numpy(update.down.load()).double()
            delta = delta * update.scale
        whole = parameter.data.double() + delta.reshape(parameter.shape)
        if isinstance(update, LowRank) and update.magnitude is not None:
            norms = whole.flatten(1).norm(dim=1)
            ratio = torch.from_numpy(update.magnitude.vector.load()).double() / norms
            whole = whole * ratio.reshape(-1, *[1] * (whole.ndim - 1))
        parameter.data = whole.to(parameter.dtype)
    return found


def loaded(model: Any, family: str, folder: Path) -> torch.Tensor:
    """What the model gives after diffusers has loaded a file; and before, when it is unloaded again."""
    before = step(family, model)
    pipeline = pipeline_of(family, model)
    [file] = folder.glob("*.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(folder), weight_name=file.name)
        after = step(family, model)
        pipeline.unload_lora_weights()
    torch.testing.assert_close(step(family, model), before)
    assert float((after - before).abs().max()) > 1e-3, "the adapter does something"
    return after


CASES = [("diffusers", family) for family in MODELS] + [(to, family) for to, every in READ.items() for family in every]


@pytest.mark.parametrize(("target", "family"), CASES)
def test_diffusers_gives_what_the_adapter_means(target: str, family: str, tmp_path: Path) -> None:
    model = model_of(family)
    scale = 0.5 if target == "comfy" else 0.75
    adapter = adapter_for(model, family, scale=scale, only_blocks=target != "diffusers")
    save_adapter(adapter, tmp_path / "out", to=target)
    wanted = step(family, changed(model, adapter))
    # float32 on both sides, in another order of sums
    torch.testing.assert_close(loaded(model, family, tmp_path / "out"), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["sd", "flux", "wan"])
def test_diffusers_loads_dora_for_each_output(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    adapter = adapter_for(model, family, scale=0.75, only_blocks=False, dora=True)
    save_adapter(adapter, tmp_path / "out", to="diffusers")
    wanted = step(family, changed(model, adapter))
    torch.testing.assert_close(loaded(model, family, tmp_path / "out"), wanted, rtol=2e-4, atol=2e-4)


def test_diffusers_loads_lokr_of_flux_2_as_lycoris(tmp_path: Path) -> None:
    model = model_of("flux2")
    updates: dict[str, tuple[Update, ...]] = {}
    for name, layer in layers(model, "flux2", only_blocks=True).items():
        if "transformer_blocks" not in name:
            continue
        rows, cols = layer.weight.shape
        sides = (random(f"{name}.l", 2, 2), random(f"{name}.r", rows // 2, cols // 2))
        updates[f"transformer.{name}.weight"] = (Kronecker(*((LazyTensor.of(side),) for side in sides), 1.0),)
    pipeline = Pipeline(families=("flux2",), components=("transformer",))
    adapter = Adapter(config=AdapterConfig(pipeline=pipeline), updates=updates)
    save_adapter(adapter, tmp_path / "out", to="lycoris")
    wanted = step("flux2", changed(model, adapter))
    torch.testing.assert_close(loaded(model, "flux2", tmp_path / "out"), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", MODELS)
def test_what_diffusers_saves_is_read(family: str, tmp_path: Path) -> None:
    """peft injects, diffusers saves with rank and alpha patterns in the header, and the deltas are those of peft."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = model_of(family)
    names = sorted(layers(model, family, only_blocks=False))
    settings = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=names,
        rank_pattern={f"^{names[0]}": 1},
        alpha_pattern={f"^{names[1]}": 5},
        init_lora_weights=False,
        use_rslora=True,
    )
    model.add_adapter(settings)
    pipeline = pipeline_of(family, model)
    component = family_named(family).component
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    header = {f"{component}_lora_adapter_metadata": settings.to_dict()}
    type(pipeline).save_lora_weights(str(tmp_path), **{f"{component}_lora_layers": state}, **header)
    found = load_adapter(tmp_path)
    modules = dict(model.named_modules())
    assert {weight.partition(".")[2].removesuffix(".weight") for weight in found.updates} == set(names)
    for weight, (update,) in found.updates.items():
        wanted = modules[weight.partition(".")[2].removesuffix(".weight")].get_delta_weight("default")
        assert isinstance(update, LowRank)
        delta = torch.from_numpy(update.up.load() @ update.down.load()) * update.scale
        torch.testing.assert_close(delta.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_every_layer_of_the_model_is_in_the_table(family: str) -> None:
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    names = {name for name, each in model_of(family).named_modules() if isinstance(each, kinds)}
    table = family_named(family)
    assert not {name for name in names if table.find(spelled(name), DIFFUSERS) is None}


@pytest.mark.parametrize("family", MODELS)
def test_a_merged_pipeline_is_what_fuse_lora_makes_of_it(family: str, tmp_path: Path) -> None:
    """The weights, in float32, of the model after diffusers has loaded and fused the same adapter."""
    model, component = model_of(family), family_named(family).component
    adapter = adapter_for(model, family, scale=0.75, only_blocks=False)
    save_adapter(adapter, tmp_path / "adapter", to="diffusers")
    base = tmp_path / "base"
    model.save_pretrained(base / component)
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": "Pipeline", component: ["diffusers", type(model).__name__]}
    (base / "model_index.json").write_text(json.dumps(index))
    [file] = (tmp_path / "adapter").glob("*.safetensors")
    report = merge(base, [file], tmp_path / "out")
    assert report.data.tensors_touched == len(adapter.updates)
    pipeline = pipeline_of(family, model)
    pipeline.load_lora_weights(str(tmp_path / "adapter"), weight_name=file.name)
    getattr(pipeline, component).fuse_lora()
    fused = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    merged = type(model).from_pretrained(tmp_path / "out" / component).state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, fused[name], rtol=1e-5, atol=1e-5, msg=name)
