"""Merges whose weights go into codes again: against the values that they must be near, in every block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger.checkpoints import contents, load
from numpy.typing import NDArray
from peft.utils.merge_utils import ties
from quantization.encoders import NF4, Encoded
from quantization.models import (
    MODULES,
    UP,
    K,
    O,
    Q,
    adapter,
    encoded,
    magnitude,
    same,
    save,
    save_adapter,
    update,
)

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.errors import MergeError, UnsupportedUpdate, UsageError
from loraformat.merger import MergePlan, open_inputs
from loraformat.merger.verify import check_output
from loraformat.storage import LocalStore

Floats = NDArray[np.float64]
RECODED = [
    "bitsandbytes NF4",
    "bitsandbytes NF4, double",
    "bitsandbytes FP4, blocks of 128",
    "bitsandbytes INT8",
    "FP8, blocks of 8 x 16",
    "FP8, E8M0 as bytes",
    "FP8, E8M0",
    "FP8, names of Mistral",
]
FEW = ["bitsandbytes NF4, double", "bitsandbytes INT8", "FP8, blocks of 8 x 16"]


def merge(base: Path, adapters: list[Path], out: Path, **options: Any) -> loraformat.Report:
    paths = [str(path) for path in adapters]
    return loraformat.merge(
        str(base), paths, str(out), requantize=True, least_kept=0.0, **{"verify": "full", **options}
    )


def values_of(folder: Path, module: str) -> Floats:
    weight = open_checkpoint(str(folder)).weights[f"{module}.weight"]
    return np.array(weight.read(0, weight.shape[0])).astype(np.float64)


def nearest(exact: Floats, name: str) -> Floats:
    """Half of the distance between neighbouring codes where each value lies, by the largest value of its block."""
    if "INT8" in name:
        return np.broadcast_to(np.abs(exact).max(axis=1)[:, None] / 254, exact.shape) + np.abs(exact) * 2.0**-10
    if name.startswith("bitsandbytes"):
        book = np.array(NF4) if "NF4" in name else np.array([*FP4_OF_BNB, *(-one for one in FP4_OF_BNB)])
        size, flat = 128 if "128" in name else 64, exact.reshape(-1)
        found = np.empty(len(flat))
        for low in range(0, len(flat), size):
            block = flat[low : low + size]
            most = np.abs(block).max()
            found[low : low + size] = np.abs(block[:, None] - book * most).min(axis=1) + 1e-6 * most
            if "double" in name:  # The map of these bases has steps as wide as a tenth of the largest scale.
                found[low : low + size] += 0.1 * np.abs(flat).max()
        return found.reshape(exact.shape)
    rows, cols = next(size for key, size in BLOCKS.items() if key in name)
    found = np.empty_like(exact)
    for top in range(0, exact.shape[0], rows):
        for left in range(0, exact.shape[1], cols):
            block = exact[top : top + rows, left : left + cols]
            scale = np.abs(block).max() / 448
            scale = 2.0 ** np.ceil(np.log2(scale)) if "E8M0" in name else scale
            step = np.exp2(np.maximum(np.floor(np.log2(np.abs(block) / scale + 1e-300)), -6) - 3)
            found[top : top + rows, left : left + cols] = step * scale / 2 * (1 + 1e-6)
    return found


FP4_OF_BNB = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
BLOCKS = {"8 x 16": (8, 16), "E8M0": (16, 8), "Mistral": (8, 8)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", RECODED)
def test_every_value_is_the_nearest_that_codes_can_mean(tmp_path: Path, name: str, shards: int) -> None:
    weights, out = encoded(name, out=27, inputs=96), tmp_path / "o"
    base = save(tmp_path / "b", weights, shards=shards, nested=shards == 3)
    report = merge(base, [adapter(tmp_path / "a", weights, (Q, UP))], out)
    assert report.data.recoded == 2
    found, before = load(out), load(base)
    assert found.keys() == before.keys()
    touched = {key for module in (Q, UP) for key in weights[module].tensors}
    assert all(same(found[key], before[key]) for key in before.keys() - touched)
    said, settings = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert said == settings
    total = whole = 0.0
    for number, module in enumerate((Q, UP)):
        change = update(weights[module].values.shape, number)
        exact = weights[module].values.astype(np.float64) + change
        error = values_of(out, module) - exact
        assert (np.abs(error) <= nearest(exact, name)).all(), module
        total, whole = total + float((error**2).sum()), whole + float((change**2).sum())
    assert report.data.code_error == pytest.approx(np.sqrt(total / whole), rel=1e-5)
    if shards == 3:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
    assert loraformat.verify(str(out), base=str(base)).ok


def test_what_is_kept_is_what_the_codes_mean(tmp_path: Path) -> None:
    for name in FEW:
        weights = encoded(name)
        base, out = save(tmp_path / f"b {name}", weights), tmp_path / name
        report = merge(base, [adapter(tmp_path / f"a {name}", weights, (O,))], out)
        change = update(weights[O].values.shape, 0)
        moved = values_of(out, O) - weights[O].values
        wanted = float((moved * change).sum() / (change**2).sum())
        assert report.data.retained == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_written_where_too_little_is_kept(tmp_path: Path, name: str) -> None:
    weights, out = encoded(name), tmp_path / "o"
    base, change = save(tmp_path / "b", weights), adapter(tmp_path / "a", weights, (Q,))
    with pytest.raises(MergeError, match="survives quantizing the weights again, expected 90"):
        loraformat.merge(str(base), [f"{change}=0.00001"], str(out), requantize=True)
    assert not out.exists()


@pytest.mark.parametrize("name", FEW)
def test_several_adapters_and_dora(tmp_path: Path, name: str) -> None:
    weights = encoded(name)
    base, shape = save(tmp_path / "b", weights), weights[O].values.shape
    changes = [adapter(tmp_path / "a1", weights, (Q, O)), adapter(tmp_path / "a2", weights, (O,), seed=40)]
    merge(base, changes, tmp_path / "o")
    exact = weights[O].values.astype(np.float64) + update(shape, 1) + update(shape, 40)
    assert (np.abs(values_of(tmp_path / "o", O) - exact) <= nearest(exact, name)).all()
    dora = adapter(tmp_path / "a3", weights, (O,), use_dora=True)
    merge(base, [dora], tmp_path / "d")
    whole = weights[O].values.astype(np.float64) + update(shape, 0)
    exact = whole * (magnitude(shape[0]).double().numpy() / np.sqrt((whole * whole).sum(axis=1)))[:, None]
    assert (np.abs(values_of(tmp_path / "d", O) - exact) <= nearest(exact, name) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", RECODED)
def test_a_weight_that_does_not_change_keeps_its_codes(tmp_path: Path, name: str) -> None:
    weights = encoded(name, out=27, inputs=96)
    base, change = save(tmp_path / "b", weights, shards=2), adapter(tmp_path / "a", weights, (Q,))
    loraformat.merge(str(base), [f"{change}=0"], str(tmp_path / "o"), requantize=True, verify="full")
    assert np.array_equal(values_of(tmp_path / "o", Q), weights[Q].values)
    before = load(base)
    assert all(same(value, before[key]) for key, value in load(tmp_path / "o").items() if "quant_state" not in key)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_ties_and_codes(tmp_path: Path, name: str, density: float) -> None:
    """Values near the threshold hang on a rounding: the check allows both, and what is written is right."""
    weights = encoded(name, out=40)
    base = save(tmp_path / "b", weights)
    changes = [adapter(tmp_path / f"a{seed}", weights, (O,), seed=seed) for seed in (3, 40)]
    merge(base, changes, tmp_path / "o", method="ties", density=density)
    shape = weights[O].values.shape
    both = [torch.from_numpy(update(shape, seed)) for seed in (3, 40)]
    exact = weights[O].values + ties(both, torch.ones(2, dtype=torch.float64), density, "total").numpy()
    assert (np.abs(values_of(tmp_path / "o", O) - exact) <= nearest(exact, name)).mean() > 0.95


@pytest.mark.parametrize("name", RECODED)
def test_windows_and_threads_do_not_show(tmp_path: Path, name: str) -> None:
    """Odd rows, blocks cut short, scales in another file."""
    weights = encoded(name, out=67, inputs=96)
    base, change = save(tmp_path / "b", weights, shards=2), adapter(tmp_path / "a", weights, (Q, UP))
    outputs = []
    for number, (jobs, memory) in enumerate([(1, 64 << 20), (3, 1), (2, 5000)]):
        merge(base, [change], tmp_path / f"o{number}", jobs=jobs, memory_nbytes=memory)
        outputs.append(contents(tmp_path / f"o{number}"))
    assert outputs[0] == outputs[1] == outputs[2]


class Stopped(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("name", FEW)
def test_a_stopped_run_goes_on(tmp_path: Path, name: str) -> None:
    weights = encoded(name)
    base, change = save(tmp_path / "b", weights, shards=3), adapter(tmp_path / "a", weights, MODULES)
    whole = merge(base, [change], tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > 0.5 * total:
            raise Stopped

    with pytest.raises(Stopped):
        merge(base, [change], tmp_path / "o", progress=stop, resume=True)
    assert not (tmp_path / "o").exists()
    resumed = merge(base, [change], tmp_path / "o", resume=True)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
    assert resumed.data.code_error == whole.data.code_error


def test_a_stack_of_experts(tmp_path: Path) -> None:
    """Blocks of rows end with each matrix."""
    chance = np.random.default_rng(0)
    experts, rows, cols, block = 3, 20, 32, 16
    codes = chance.integers(0, 127, (experts, rows, cols)).astype(np.uint8)
    grid = chance.uniform(0.01, 0.1, (experts, 2, 2)).astype(np.float32)
    name = "model.layers.0.mlp.experts.down_proj"
    stored = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    values = stored.float().numpy() * np.repeat(np.repeat(grid, block, axis=1)[:, :rows], block, axis=2)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    tensors = {name: stored, f"{name}_scale_inv": torch.from_numpy(grid)}
    base = save(tmp_path / "b", {name: Encoded(tensors, settings, values, name)}, model_type="qwen3_moe")
    down, up = torch.rand(3 * experts, cols), torch.rand(rows, 3 * experts)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    factors_of = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    change = save_adapter(
        tmp_path / "a", factors_of, (), target_parameters=["mlp.experts.down_proj"], target_modules=[]
    )
    for number, memory in enumerate((64 << 20, 1)):
        merge(base, [change], tmp_path / f"o{number}", memory_nbytes=memory)
    assert contents(tmp_path / "o0") == contents(tmp_path / "o1")
    exact = values.astype(np.float64)
    a, b = down.double().numpy().reshape(experts, 3, cols), up.double().numpy().reshape(rows, 3, experts)
    for expert in range(experts):
        exact[expert] += 2.0 * (b[:, :, expert] @ a[expert])
    weight = open_checkpoint(str(tmp_path / "o0")).weights[name]
    error = np.abs(np.array(weight.read(0, experts)).astype(np.float64) - exact)
    for expert in range(experts):
        for top in (0, block):
            for left in (0, block):
                part = exact[expert, top : top + block, left : left + block]
                most = np.abs(part).max()
                step = np.exp2(np.maximum(np.floor(np.log2(np.abs(part) * 448 / most)), -6) - 3) * most / 448
                assert (error[expert, top : top + block, left : left + block] <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    "name", ["GPTQ, 4 bits", "AWQ", "ModelOpt NVFP4", "compressed-tensors, INT8", "FP8, one scale"]
)
def test_codes_that_need_data_are_refused(tmp_path: Path, name: str) -> None:
    weights = encoded(name)
    base, change = save(tmp_path / "b", weights), adapter(tmp_path / "a", weights, (K,))
    with pytest.raises(UnsupportedUpdate, match="cannot be quantized again without calibration data"):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), requantize=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"container": "torch"},
        {"rounding": "stochastic"},
        {"max_shard_nbytes": 1 << 20},
        {"dequantize": True},
        {"keep_quantized": True},
        {"as_trained": "nf4"},
        {"least_kept": 1.5},
        {"dequantize": True, "requantize": False, "least_kept": 0.5},
    ],
)
def test_options_that_do_not_go_with_codes(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = encoded("bitsandbytes NF4")
    base, change = save(tmp_path / "b", weights), adapter(tmp_path / "a", weights, (K,))
    with pytest.raises(UsageError):
        loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), **{"requantize": True, **options})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", RECODED)
def test_the_check_notices_another_code_and_another_scale(tmp_path: Path, name: str) -> None:
    weights = encoded(name)
    base, change = save(tmp_path / "b", weights), adapter(tmp_path / "a", weights, (O,))
    options = {"requantize": True, "least_kept": 0.0}
    planned = loraformat.merge(str(base), [str(change)], str(tmp_path / "o"), dry_run=True, **options)  # type: ignore[arg-type]
    merge(base, [change], tmp_path / "o")
    plan = MergePlan.from_json(planned.data.plan)
    inputs, output = open_inputs(plan), LocalStore(str(tmp_path / "o"))
    check_output(plan, inputs, output, full=True)
    parts = open_checkpoint(str(tmp_path / "o")).quantized.weights[f"{O}.weight"].parts  # type: ignore[union-attr]
    path = tmp_path / "o" / "model.safetensors"
    whole = path.read_bytes()
    for part in parts[:2]:
        offset, nbytes = open_checkpoint(str(tmp_path / "o")).as_stored.tensors[part].span
        for at in (0, nbytes // 2, nbytes - 2):
            data = bytearray(whole)
            # The upper bits of a code or exponent; of float32 scales those of the last byte.
            place = offset + (at | 3 if part == parts[1] and nbytes % 4 == 0 else at)
            data[place] ^= 0x11
            path.write_bytes(data)
            with pytest.raises(MergeError, match=r"the independent computation gives|not quantized in the output"):
                check_output(plan, inputs, LocalStore(str(tmp_path / "o")), full=True)
    path.write_bytes(whole)
    check_output(plan, inputs, LocalStore(str(tmp_path / "o")), full=True)
