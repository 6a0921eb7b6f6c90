"""What the libraries of the schemes write and read back, bit for bit after their last rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization.encoders import MODULE, Encoded, write
from quantization.models import save_adapter
from safetensors.torch import load_file

import loraformat
from loraformat.containers import open_checkpoint

pytestmark = pytest.mark.oracle
# Rows of whole blocks: elsewhere bitsandbytes 0.50.2 on the CPU does not read back what it wrote itself. Of (48, 80) in
# blocks of 64 its values are 2.5 times as far from the weight as those by its own definition, which are ours.
SHAPES = [(48, 128), (33, 256), (1, 128)]


def values_of(folder: Path, one: Encoded) -> torch.Tensor:
    weight = open_checkpoint(str(write(folder, one))).weights[f"{MODULE}.weight"]
    return torch.from_numpy(np.array(weight.read(0, weight.shape[0])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_in_four_bits(tmp_path: Path, kind: str, nested: bool, block: int, storage: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for number, shape in enumerate(SHAPES):
        dense = torch.randn(*shape, generator=torch.Generator().manual_seed(number)).bfloat16()
        codes, state = functional.quantize_4bit(
            dense, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        weight = f"{MODULE}.weight"
        tensors = {f"{weight}.{name}": value.contiguous() for name, value in state.as_dict(packed=True).items()}
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        one = Encoded({**tensors, weight: codes}, settings, np.zeros(0, np.float32))
        expected = functional.dequantize_4bit(codes, state)
        assert torch.equal(values_of(tmp_path / f"{number}", one).to(expected.dtype), expected), shape


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_in_eight_bits(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    dense = torch.randn(40, 72, generator=torch.Generator().manual_seed(1)).half()
    codes, scales, _ = functional.int8_vectorwise_quant(dense)
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.SCB": scales.float()}
    one = Encoded(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, np.zeros(0, np.float32))
    assert torch.equal(values_of(tmp_path / "b", one), functional.int8_vectorwise_dequant(codes, scales.float()))


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}),
    ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}),
    ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "weights"), FORMATS)
def test_compressed_tensors(tmp_path: Path, kind: str, weights: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    chance = torch.Generator().manual_seed(2)
    dense = torch.randn(32, 64, generator=chance).bfloat16()
    arguments = QuantizationArgs(**weights)
    group = weights.get("group_size") or dense.shape[1]
    blocks = dense.float().reshape(32, -1, group)
    most = 7 if weights["num_bits"] == 4 else 127
    scale = blocks.abs().amax(dim=2) / (most if weights["type"] == "int" else 448 if weights["num_bits"] == 8 else 6)
    state: dict[str, torch.Tensor] = {"weight": dense, "weight_scale": scale.bfloat16()}
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-8, 8, scale.shape, generator=chance, dtype=torch.int8)
    if "nvfp4" in kind:
        total = 448 * 6 / dense.float().abs().max()
        state["weight_global_scale"] = total.reshape(1)
        state["weight_scale"] = (scale * total).to(torch.float8_e4m3fn).bfloat16()
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=kind)
    compressor = BaseCompressor.get_value_from_registry(kind)
    written = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(written), scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    one = Encoded(
        {f"{MODULE}.{name}": value.contiguous() for name, value in written.items()}, settings, np.zeros(0, np.float32)
    )
    assert torch.equal(values_of(tmp_path / "b", one).to(expected.dtype), expected)


def merged_again(folder: Path, base: Path, shape: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the merged weight in float32, the tensors of the output) of a LoRA of rank 2 merged into a base of codes."""
    weight, (rows, cols) = f"{MODULE}.weight", shape
    before = open_checkpoint(str(base)).weights[weight].read(0, rows).astype(np.float64)
    down, up = (torch.randint(-9, 10, size).float() / 32 for size in ((2, cols), (rows, 2)))
    pair = {f"base_model.model.{MODULE}.lora_{letter}.weight": one for letter, one in (("A", down), ("B", up))}
    change = save_adapter(folder / "a", pair, (MODULE,), r=2, lora_alpha=2)
    loraformat.merge(str(base), [str(change)], str(folder / "o"), requantize=True, least_kept=0.0, verify="full")
    merged = torch.from_numpy(before + (up.double() @ down.double()).numpy()).float()
    return merged, load_file(folder / "o" / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_codes_of_a_merge_are_those_of_bitsandbytes(tmp_path: Path, kind: str, nested: bool) -> None:
    """The library quantizes the merged float32 values; scales that are quantized may differ by a step of their map."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    dense = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    codes, state = functional.quantize_4bit(dense, compress_statistics=nested, quant_type=kind)
    weight = f"{MODULE}.weight"
    tensors = {f"{weight}.{name}": value.contiguous() for name, value in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = write(tmp_path / "b", Encoded({**tensors, weight: codes}, settings, np.zeros(0, np.float32)))
    merged, found = merged_again(tmp_path, base, (48, 128))
    wanted, stated = functional.quantize_4bit(merged, compress_statistics=nested, quant_type=kind)
    assert torch.equal(found[weight].reshape(-1), wanted.reshape(-1))
    read = functional.QuantState.from_dict(
        {name.removeprefix(f"{weight}."): v for name, v in found.items() if name.startswith(f"{weight}.")},
        device=torch.device("cpu"),
    )
    decoded = functional.dequantize_4bit(found[weight], read)
    expected = functional.dequantize_4bit(wanted, stated)
    if nested:
        assert read.offset == pytest.approx(float(stated.offset), rel=1e-6)
        # Sums in another order move the mean of the scales by a last digit.
        assert ((decoded - expected).abs() > 1e-6 * merged.abs().max()).float().mean() < 0.02
        assert torch.allclose(decoded, expected, rtol=0.02, atol=0.02 * float(merged.abs().max()))
    else:
        assert torch.equal(decoded, expected)


@pytest.mark.filterwarnings("ignore")
def test_bytes_of_a_merge_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(40, 72).half())
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.SCB": scales.float()}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    base = write(tmp_path / "b", Encoded(tensors, settings, np.zeros(0, np.float32)))
    merged, found = merged_again(tmp_path, base, (40, 72))
    wanted, stated, _ = functional.int8_vectorwise_quant(merged.half())
    assert torch.equal(found[f"{MODULE}.weight"], wanted)
    assert torch.equal(found[f"{MODULE}.SCB"], stated.float())
