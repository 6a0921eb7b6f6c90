"""merge --method: updates combined by TIES and DARE on the way into the base, against PEFT's own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from merger.checkpoints import adapter_folder, config, contents, load, save_base, weights
from peft.utils.merge_utils import ties
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.cli import main
from loraformat.errors import MergeError, UnsupportedUpdate, UsageError
from loraformat.merger import MergePlan, open_inputs
from loraformat.merger.verify import check_output
from loraformat.storage import LocalStore

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.q_proj.weight": (24, 24),
    "model.layers.0.up_proj.weight": (130, 24),
    "model.layers.1.down_proj.weight": (24, 130),
}
RATIOS = [0.7, -0.4, 1.0]
METHODS = ["ties", "dare", "dare-ties"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, list[str]]:
    """A base, and three adapters of which the last changes one weight alone."""
    base = save_base(tmp_path / "base", weights(), config())
    one = {name: SHAPES[name] for name in list(SHAPES)[:1]}
    folders = [
        adapter_folder(tmp_path / str(seed), SHAPES if seed < 2 else one, rank=2 + seed, scale=1.5, seed=seed)
        for seed in range(3)
    ]
    return str(base), [f"{folder}={ratio}" for folder, ratio in zip(folders, RATIOS, strict=True)]


def deltas(adapters: list[str], weight: str) -> list[torch.Tensor]:
    """Of each adapter that changes a weight, in float64."""
    found = []
    for adapter in adapters:
        folder = Path(adapter.rpartition("=")[0])
        tensors = load_file(folder / "adapter_model.safetensors")
        said = json.loads((folder / "adapter_config.json").read_text())
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            down, up = (tensors[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
            found.append(said["lora_alpha"] / said["r"] * up @ down)
    return found


def merge(base: str, adapters: list[str], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    loraformat.merge(base, adapters, str(out), **{"verify": "full", **options})
    return load(out)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_is_that_of_peft(inputs: tuple[str, list[str]], tmp_path: Path, sign: str, density: float) -> None:
    base, adapters = inputs
    found = merge(base, adapters, tmp_path / "o", method="ties", density=density, sign=sign)
    before = load(Path(base))
    for name in SHAPES:
        changes = deltas(adapters, name)
        ratios = torch.tensor(RATIOS[: len(changes)], dtype=torch.float64)
        wanted = before[name].double() + ties(changes, ratios, density, sign)
        assert torch.allclose(found[name].double(), wanted, rtol=1e-6, atol=1e-6), name
    assert all(torch.equal(found[name], before[name]) for name in before.keys() - SHAPES.keys())


def test_dare_keeps_a_share_and_scales_it_up(inputs: tuple[str, list[str]], tmp_path: Path) -> None:
    base, adapters = inputs
    name = "model.layers.0.up_proj.weight"
    found = merge(base, adapters[:1], tmp_path / "o", method="dare", density=0.4, dtype="float32", seed=5)
    moved = found[name].double() - load(Path(base))[name].double()
    (change,) = deltas(adapters[:1], name)
    kept = RATIOS[0] * change / 0.4
    is_kept = torch.isclose(moved, kept, rtol=1e-3, atol=1e-5)
    assert (is_kept | (moved == 0)).all()
    assert 0.36 < is_kept.double().mean() < 0.44
    again = merge(base, adapters[:1], tmp_path / "p", method="dare", density=0.4, seed=6)
    assert not torch.equal(again[name], found[name])


@pytest.mark.parametrize("method", METHODS)
def test_it_is_combine_without_a_cut_of_rank(inputs: tuple[str, list[str]], tmp_path: Path, method: str) -> None:
    base, adapters = inputs
    found = merge(base, adapters, tmp_path / "o", method=method, density=0.3, seed=3)
    loraformat.combine(adapters, tmp_path / "c", method=method, density=0.3, seed=3, rank=24)
    wanted = merge(base, [str(tmp_path / "c")], tmp_path / "p")
    for name in SHAPES:
        assert torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_windows_and_threads_do_not_show(inputs: tuple[str, list[str]], tmp_path: Path, method: str) -> None:
    base, adapters = inputs
    outputs = []
    for number, (jobs, memory) in enumerate([(1, 64 << 20), (3, 1), (2, 5000)]):
        merge(base, adapters, tmp_path / f"o{number}", method=method, density=0.3, jobs=jobs, memory_nbytes=memory)
        outputs.append(contents(tmp_path / f"o{number}"))
    assert outputs[0] == outputs[1] == outputs[2]
    said = json.loads(outputs[0]["loraformat.manifest.json"])["options"]
    assert (said["method"], said["density"], said["sign"], said["seed"]) == (method, 0.3, "total", 0)


def test_equal_magnitudes_are_kept_in_the_order_of_their_places(tmp_path: Path) -> None:
    """A change of ones alone: the first of them stay, wherever a window begins."""
    tensors = {"model.layers.0.up_proj.weight": torch.zeros(600, 8)}
    base = save_base(tmp_path / "base", tensors, config())
    prefix = "base_model.model.model.layers.0.up_proj"
    folder = adapter_folder(tmp_path / "a", {"model.layers.0.up_proj.weight": (600, 8)}, rank=1)
    ones = {f"{prefix}.lora_A.weight": torch.ones(1, 8), f"{prefix}.lora_B.weight": torch.ones(600, 1)}
    save_file(ones, folder / "adapter_model.safetensors")
    for memory in (64 << 20, 1):
        out = tmp_path / f"o{memory}"
        loraformat.merge(
            str(base), [str(folder)], str(out), method="ties", density=0.51, memory_nbytes=memory, verify="none"
        )
        kept = load(out)["model.layers.0.up_proj.weight"].reshape(-1) != 0
        assert kept.nonzero().reshape(-1).tolist() == list(range(int(0.51 * 4800)))


def test_weights_that_one_tensor_holds_are_combined_apart(tmp_path: Path) -> None:
    """Experts in a stack: each is a matrix of its own."""
    name = "model.layers.0.mlp.experts.down_proj"
    base = save_base(tmp_path / "base", {name: torch.randn(3, 20, 16)}, config(model_type="qwen3_moe"))
    folders, pairs = [], []
    for seed in range(2):
        chance = torch.Generator().manual_seed(seed)
        down, up = torch.randn(6, 16, generator=chance), torch.randn(20, 6, generator=chance)
        folder = adapter_folder(tmp_path / str(seed), {"x.weight": (20, 16)}, rank=2)
        said = json.loads((folder / "adapter_config.json").read_text())
        said |= {"r": 2, "lora_alpha": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        prefix = "base_model.model.model.layers.0.mlp.experts"
        save_file(
            {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors"
        )
        folders.append(str(folder))
        pairs.append((up.double().reshape(20, 2, 3), down.double().reshape(3, 2, 16)))
    found = merge(str(base), folders, tmp_path / "o", method="ties", density=0.5)[name]
    before = load(base)[name]
    for expert in range(3):
        changes = [up[:, :, expert] @ down[expert] for up, down in pairs]
        wanted = before[expert].double() + ties(changes, torch.ones(2, dtype=torch.float64), 0.5, "total")
        assert torch.allclose(found[expert].double(), wanted, rtol=1e-5, atol=1e-5), expert


@pytest.mark.parametrize("method", METHODS)
def test_the_check_notices_another_value(inputs: tuple[str, list[str]], tmp_path: Path, method: str) -> None:
    base, adapters = inputs
    options: dict[str, Any] = {"method": method, "density": 0.3, "seed": 2}
    planned = loraformat.merge(base, adapters, str(tmp_path / "o"), dry_run=True, **options)
    merge(base, adapters, tmp_path / "o", **options)
    plan = MergePlan.from_json(json.loads(json.dumps(planned.data.plan)))
    found = load(tmp_path / "o")
    name = "model.layers.0.up_proj.weight"
    moved = np.abs((found[name] - load(Path(base))[name]).numpy())
    row, column = np.unravel_index(moved.argmax(), moved.shape)
    wrong = {**found, name: found[name].clone()}
    wrong[name][int(row), int(column)] = load(Path(base))[name][int(row), int(column)]  # the value was dropped
    save_file(wrong, tmp_path / "o" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="the independent computation gives"):
        check_output(plan, open_inputs(plan), LocalStore(str(tmp_path / "o")), full=True)


def test_what_is_no_sum_is_refused_before_anything_is_written(inputs: tuple[str, list[str]], tmp_path: Path) -> None:
    base, adapters = inputs
    folder = Path(adapters[0].rpartition("=")[0])
    tensors = load_file(folder / "adapter_model.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    for name, shape in SHAPES.items():
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = torch.ones(shape[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedUpdate, match="cannot be combined with others by dare"):
        loraformat.merge(base, [str(folder), adapters[1]], str(tmp_path / "o"), method="dare", density=0.5)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ties"},
        {"density": 0.5},
        {"method": "dare", "density": 0.0},
        {"method": "dare", "density": 1.5},
        {"method": "dare", "density": float("nan")},
        {"method": "della", "density": 0.5},
        {"method": "ties", "density": 0.5, "sign": "most"},
        {"method": "dare", "density": 0.5, "sign": "frequency"},
    ],
)
def test_senseless_options(inputs: tuple[str, list[str]], tmp_path: Path, options: dict[str, Any]) -> None:
    base, adapters = inputs
    with pytest.raises(UsageError):
        loraformat.merge(base, adapters, str(tmp_path / "o"), **options)
    assert not (tmp_path / "o").exists()


def test_the_command(inputs: tuple[str, list[str]], tmp_path: Path) -> None:
    base, adapters = inputs
    line = ["merge", base, *adapters, "-o", str(tmp_path / "o"), "--method", "ties", "--density", "0.5", "--seed", "1"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "o").keys() >= {"model.safetensors", "loraformat.manifest.json"}
    assert loraformat.verify(str(tmp_path / "o"), base=base).ok
