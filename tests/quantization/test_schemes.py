"""What codes and scales mean: every value of every scheme, in any window, against encoders that share no code."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantization.encoders import ENCODERS, MODULE, Encoded, block_fp8, bnb4, compressed, gptq, nvfp4, write
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.containers import open_checkpoint
from loraformat.containers.quantized import parts, reference_rows
from loraformat.errors import FormatError, LoraFormatError, NonFiniteValue

SHAPES = [(24, 64), (1, 32), (13, 96), (70, 33), (129, 40)]


def encoded(name: str, out: int, inputs: int, seed: int = 0) -> Encoded:
    return ENCODERS[name](np.random.default_rng(seed), out, inputs)


def same(found: Any, wanted: Any) -> bool:
    """Bit for bit, in float32: -0 is not 0."""
    return found.shape == wanted.shape and found.astype("<f4").tobytes() == wanted.astype("<f4").tobytes()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_value(tmp_path: Path, name: str, shards: int) -> None:
    for number, (out, inputs) in enumerate(SHAPES):
        one = encoded(name, out, inputs, seed=number)
        base = open_checkpoint(str(write(tmp_path / f"{number}", one, shards)))
        weight = base.weights[one.name]
        assert base.quantized is not None
        assert weight.shape == one.values.shape == base.tensors[one.name].shape
        found = np.asarray(weight.read(0, weight.shape[0]))
        assert same(found, one.values), (out, inputs)
        assert same(reference_rows(base.quantized, base.tensors[one.name], 0, weight.shape[0]), one.values)


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_in_a_file_of_torch(tmp_path: Path, name: str) -> None:
    one = encoded(name, 24, 64)
    folder = write(tmp_path / "b", one)
    (folder / "model.safetensors").unlink()
    torch.save(one.tensors, folder / "pytorch_model.bin")
    base = open_checkpoint(str(folder))
    weight = base.weights[one.name]
    assert base.quantized is not None
    assert same(np.asarray(weight.read(1, weight.rows)), one.values[1:])
    assert same(reference_rows(base.quantized, base.tensors[one.name], 1, weight.rows), one.values[1:])


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_do_not_show(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    one = encoded(name, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5)) * 32, data.draw(st.integers(0, 99)))
    base = open_checkpoint(str(write(tmp_path_factory.mktemp("base") / "b", one)))
    weight = base.weights[one.name]
    start = data.draw(st.integers(0, weight.shape[0]))
    stop = data.draw(st.integers(start, weight.shape[0]))
    assert same(np.asarray(weight.read(start, stop)), one.values[start:stop])
    assert base.quantized is not None
    if stop > start:
        assert same(reference_rows(base.quantized, base.tensors[one.name], start, stop), one.values[start:stop])


def test_nf4_may_be_stored_under_another_dtype(tmp_path: Path) -> None:
    """FSDP wants all tensors of one dtype: the bytes of the codes are called bfloat16."""
    one = bnb4(storage=torch.bfloat16)(np.random.default_rng(3), 16, 64)
    assert one.tensors[one.name].dtype is torch.bfloat16
    found = open_checkpoint(str(write(tmp_path / "b", one))).weights[one.name].read(0, 16)
    assert same(np.asarray(found), one.values)


def test_a_block_of_fp8_is_never_derived_from_shapes(tmp_path: Path) -> None:
    """192 rows with two scales are blocks of 128 and 64 rows, not of 96 and 96."""
    one = block_fp8(128, 32)(np.random.default_rng(4), 192, 32)
    found = np.asarray(open_checkpoint(str(write(tmp_path / "b", one))).weights[one.name].read(0, 192))
    assert same(found, one.values)
    by_shapes = np.repeat(one.tensors[f"{MODULE}.weight_scale_inv"].numpy(), 96, axis=0)
    naive = one.tensors[one.name].double().numpy() * by_shapes
    assert not np.allclose(found, naive)


@pytest.mark.parametrize("block", [None, [8, 16]])
def test_experts_of_fp8_in_windows_of_their_rows(tmp_path: Path, block: list[int] | None) -> None:
    """Three of (20, 40): blocks are cut short in each, and windows reach from one into the next."""
    chance, name = np.random.default_rng(7), "model.layers.0.mlp.experts.down_proj"
    codes = torch.from_numpy(chance.integers(0, 120, (3, 20, 40)).astype(np.uint8)).view(torch.float8_e4m3fn)
    grid = torch.from_numpy(chance.uniform(0.01, 1, (3, 3, 3) if block else (3,)).astype(np.float32))
    each = grid.repeat_interleave(8, 1).repeat_interleave(16, 2)[:, :20, :40] if block else grid[:, None, None]
    wanted = (codes.double() * each.double()).float().numpy()
    settings = {"quant_method": "fp8", "weight_block_size": block}
    one = Encoded({name: codes, f"{name}_scale_inv": grid}, settings, wanted, name)
    base = open_checkpoint(str(write(tmp_path / "b", one)))
    assert base.quantized is not None
    weight, header = base.weights[name].as_matrix(2), replace(base.tensors[name], shape=(60, 40))
    assert same(np.asarray(base.weights[name].read(1, 3)), wanted[1:3])
    for start, stop in ((0, 60), (0, 1), (19, 21), (7, 45), (59, 60)):
        assert same(np.asarray(weight.read(start, stop)), wanted.reshape(60, 40)[start:stop])
        assert same(reference_rows(base.quantized, header, start, stop), wanted.reshape(60, 40)[start:stop])


def test_experts_of_mxfp4_in_windows_of_their_inputs(tmp_path: Path) -> None:
    one = encoded("MXFP4 of gpt-oss", 24, 96)
    base = open_checkpoint(str(write(tmp_path / "b", one)))
    assert base.quantized is not None
    flat, header = one.values.reshape(192, 24), replace(base.tensors[one.name], shape=(192, 24))
    for start, stop in ((0, 192), (0, 1), (31, 33), (90, 100), (95, 96), (150, 191)):
        assert same(np.asarray(base.weights[one.name].as_matrix(2).read(start, stop)), flat[start:stop])
        assert same(reference_rows(base.quantized, header, start, stop), flat[start:stop])


def test_columns_of_gptq_and_awq_come_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of a few columns, more strips than are held, and threads that want the same."""
    monkeypatch.setattr(parts, "_MOST_STRIP_NBYTES", 200)
    monkeypatch.setattr(parts, "_MOST_HELD_NBYTES", 500)
    for name in ("GPTQ, 4 bits", "GPTQ, 3 bits", "AWQ", "GPTQ, asymmetric, act-order"):
        one = encoded(name, 104, 64)
        weight = open_checkpoint(str(write(tmp_path / name.replace(" ", ""), one))).weights[one.name]
        windows = [(low, min(104, low + height)) for height in (7, 16, 104) for low in range(0, 104, height)]
        with ThreadPoolExecutor(4) as pool:
            for (start, stop), found in zip(windows, pool.map(weight.read, *zip(*windows, strict=True)), strict=True):
                assert same(np.asarray(found), one.values[start:stop]), (name, start, stop)


def test_global_scales_divide_or_multiply_by_their_producer(tmp_path: Path) -> None:
    for producer in ("compressed-tensors", "modelopt"):
        one = nvfp4(producer)(np.random.default_rng(5), 4, 32)
        found = np.asarray(open_checkpoint(str(write(tmp_path / producer, one))).weights[one.name].read(0, 4))
        assert same(found, one.values)
        assert 1e-4 < np.abs(found).max() < 50, producer  # the other way it would be a million times as large or small


def test_a_label_of_gptq_does_not_decide_about_symmetric_codes(tmp_path: Path) -> None:
    one = gptq(4, version=2, label="gptq")(np.random.default_rng(6), 8, 32)
    found = np.asarray(open_checkpoint(str(write(tmp_path / "b", one))).weights[one.name].read(0, 8))
    assert same(found, one.values)
    by_label = found - one.tensors[f"{MODULE}.scales"].double().numpy()[np.arange(32) // 16].T
    assert not np.allclose(found, by_label)


def without(one: Encoded, end: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in one.tensors.items() if not name.endswith(end)}


MISSING = [
    ("bitsandbytes NF4", ".absmax"),
    ("bitsandbytes NF4", ".quant_map"),
    ("bitsandbytes NF4", ".quant_state.bitsandbytes__nf4"),
    ("bitsandbytes NF4, double", ".nested_absmax"),
    ("bitsandbytes NF4, double", ".nested_quant_map"),
    ("bitsandbytes INT8", ".SCB"),
    ("bitsandbytes INT8", ".weight"),
    ("FP8, blocks of 8 x 16", ".weight_scale_inv"),
    ("FP8, blocks of 8 x 16", ".weight"),
    ("MXFP4 of gpt-oss", "_scales"),
    ("GPTQ, 4 bits", ".scales"),
    ("GPTQ, 4 bits", ".qzeros"),
    ("GPTQ, asymmetric, act-order", ".g_idx"),
    ("AWQ", ".scales"),
    ("AWQ", ".qzeros"),
    ("compressed-tensors, 4 bits", ".weight_scale"),
    ("compressed-tensors, 4 bits", ".weight_shape"),
    ("compressed-tensors, 4 bits, asymmetric", ".weight_zero_point"),
    ("compressed-tensors, 4 bits, act-order", ".weight_g_idx"),
    ("compressed-tensors, FP8 a row", ".weight_scale"),
    ("compressed-tensors, NVFP4", ".weight_global_scale"),
    ("ModelOpt NVFP4", ".weight_scale"),
    ("ModelOpt NVFP4", ".weight_scale_2"),
    ("ModelOpt FP8", ".weight_scale"),
]


@pytest.mark.parametrize(("name", "end"), MISSING)
def test_a_missing_part_is_named(tmp_path: Path, name: str, end: str) -> None:
    one = encoded(name, 16, 64)
    folder = write(tmp_path / "b", one)
    save_file(without(one, end), folder / "model.safetensors")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(str(folder))
    assert end.lstrip("._").partition(".")[0] in str(caught.value)


def changed(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert name in tensors
    save_file({**tensors, name: tensor}, folder / "model.safetensors")


def bytes_of(state: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [16, 64]}
WRONG = [
    ("bitsandbytes NF4", "weight.quant_state.bitsandbytes__nf4", bytes_of({**STATE, "shape": [16, 65]}), "shape"),
    ("bitsandbytes NF4", "weight.quant_state.bitsandbytes__nf4", bytes_of({**STATE, "shape": [1 << 50, 64]}), "shape"),
    ("bitsandbytes NF4", "weight.quant_state.bitsandbytes__nf4", bytes_of({**STATE, "shape": []}), "shape"),
    ("bitsandbytes NF4", "weight.quant_state.bitsandbytes__nf4", bytes_of({**STATE, "blocksize": 0}), "blocksize"),
    ("bitsandbytes NF4", "weight.quant_state.bitsandbytes__nf4", bytes_of({**STATE, "blocksize": 48}), "blocksize"),
    (
        "bitsandbytes NF4",
        "weight.quant_state.bitsandbytes__nf4",
        bytes_of({**STATE, "quant_type": "fp4"}),
        "quant_type",
    ),
    (
        "bitsandbytes NF4",
        "weight.quant_state.bitsandbytes__nf4",
        torch.tensor([123, 34], dtype=torch.uint8),
        "quant_state",
    ),
    ("bitsandbytes NF4", "weight.quant_map", torch.linspace(-1, 1, 16), "quant_map"),
    ("bitsandbytes NF4", "weight.absmax", torch.ones(3), "absmax"),
    ("bitsandbytes INT8", "SCB", torch.ones(3), "SCB"),
    ("bitsandbytes INT8", "weight_format", torch.tensor(1, dtype=torch.uint8), "weight_format"),
    ("FP8, blocks of 8 x 16", "weight_scale_inv", torch.ones(2, 3), "weight_scale_inv"),
    ("GPTQ, 4 bits", "qzeros", torch.zeros(2, 2, dtype=torch.int32), "qzeros"),
    ("GPTQ, 4 bits", "qzeros", torch.zeros(4, 2, dtype=torch.int32), "zero points"),
    ("GPTQ, asymmetric, act-order", "g_idx", torch.zeros(7, dtype=torch.int32), "qweight"),
    ("AWQ", "qzeros", torch.zeros(1, 2, dtype=torch.int32), "qzeros"),
    ("compressed-tensors, 4 bits", "weight_shape", torch.tensor([16, 4096]), "weight_packed"),
    ("compressed-tensors, 4 bits", "weight_scale", torch.ones(16, 9, dtype=torch.bfloat16), "weight_scale"),
    ("compressed-tensors, NVFP4", "weight_global_scale", torch.tensor(1.0), "weight_global_scale"),
    ("ModelOpt NVFP4", "weight_scale", torch.ones(64, dtype=torch.uint8), "weight_scale"),
]


@pytest.mark.parametrize(("name", "part", "tensor", "words"), WRONG)
def test_a_part_of_another_shape_is_named(
    tmp_path: Path, name: str, part: str, tensor: torch.Tensor, words: str
) -> None:
    folder = write(tmp_path / "b", encoded(name, 16, 64))
    changed(folder, f"{MODULE}.{part}", tensor)
    with pytest.raises(LoraFormatError, match=words):
        open_checkpoint(str(folder))


SPOILED = [
    ("bitsandbytes NF4", "weight.absmax"),
    ("bitsandbytes INT8", "SCB"),
    ("FP8, blocks of 8 x 16", "weight_scale_inv"),
    ("GPTQ, 4 bits", "scales"),
    ("AWQ", "scales"),
    ("compressed-tensors, 4 bits", "weight_scale"),
    ("compressed-tensors, NVFP4", "weight_global_scale"),
    ("ModelOpt NVFP4", "weight_scale_2"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "part"), SPOILED)
def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path, name: str, part: str, value: float) -> None:
    one = encoded(name, 16, 64)
    folder = write(tmp_path / "b", one)
    scale = one.tensors[f"{MODULE}.{part}"].clone()
    scale.reshape(-1)[-1] = value
    changed(folder, f"{MODULE}.{part}", scale)
    weight = open_checkpoint(str(folder)).weights[one.name]
    with pytest.raises(NonFiniteValue, match=part.rpartition(".")[2]):
        weight.read(0, weight.shape[0])


def test_an_exponent_of_255_is_no_number(tmp_path: Path) -> None:
    one = encoded("MXFP4 of gpt-oss", 16, 64)
    folder = write(tmp_path / "b", one)
    exponents = one.tensors[f"{one.name}_scales"].clone()
    exponents[1, 2, 1] = 255
    changed(folder, f"{one.name}_scales", exponents)
    weight = open_checkpoint(str(folder)).weights[one.name]
    assert same(np.asarray(weight.read(0, 1)), one.values[:1])
    with pytest.raises(NonFiniteValue):
        weight.read(1, 2)


SETTINGS = [
    ("GPTQ, 4 bits", {"bits": 5}, "bits"),
    ("GPTQ, 4 bits", {"checkpoint_format": "marlin"}, "marlin"),
    ("GPTQ, 4 bits", {"group_size": 0}, "group_size"),
    ("AWQ", {"version": "gemv"}, "gemv"),
    ("AWQ", {"bits": 8}, "bits"),
    ("FP8, blocks of 8 x 16", {"weight_block_size": [8]}, "weight_block_size"),
    ("FP8, blocks of 8 x 16", {"weight_block_size": [0, 8]}, "weight_block_size"),
    ("compressed-tensors, 4 bits", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ("compressed-tensors, 4 bits", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("compressed-tensors, 4 bits", {"config_groups": {}}, "config_groups"),
    ("ModelOpt NVFP4", {"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
    ("ModelOpt NVFP4", {"quant_algo": "FP8"}, "FP8"),
]


@pytest.mark.parametrize(("name", "more", "words"), SETTINGS)
def test_settings_that_are_not_read_are_named(tmp_path: Path, name: str, more: dict[str, Any], words: str) -> None:
    one = encoded(name, 16, 64)
    folder = write(tmp_path / "b", one, quantization_config={**one.settings, **more})
    with pytest.raises(FormatError, match=words):
        open_checkpoint(str(folder))


def test_the_first_group_with_a_target_decides(tmp_path: Path) -> None:
    one = compressed(4, 16)(np.random.default_rng(7), 16, 64)
    other = compressed(8)(np.random.default_rng(8), 16, 64)
    group, rest = one.settings["config_groups"]["group_0"], other.settings["config_groups"]["group_0"]
    groups = {"group_0": {**group, "targets": [r"re:.*\.q_proj$"]}, "group_1": {**rest, "targets": ["Linear"]}}
    renamed = {name.replace("q_proj", "k_proj"): tensor for name, tensor in other.tensors.items()}
    both = Encoded({**one.tensors, **renamed}, {**one.settings, "config_groups": groups}, one.values)
    weights = open_checkpoint(str(write(tmp_path / "b", both))).weights
    assert same(np.asarray(weights[one.name].read(0, 16)), one.values)
    assert same(np.asarray(weights[one.name.replace("q_proj", "k_proj")].read(0, 16)), other.values)


def test_tensors_without_settings_are_not_decoded(tmp_path: Path) -> None:
    """A merge tool deleted the settings: what the codes mean is then nobody's guess."""
    one = encoded("bitsandbytes NF4", 16, 64)
    folder = write(tmp_path / "b", Encoded(one.tensors, {}, one.values))
    assert open_checkpoint(str(folder)).quantized is None
    with pytest.raises(loraformat.UnsupportedUpdate, match="quantized"):
        loraformat.merge(str(folder), [], str(tmp_path / "out"), dequantize=True)
    assert not (tmp_path / "out").exists()
