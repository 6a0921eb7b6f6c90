"""Quantized weights written by rule, one scheme after the other: tensors, settings, and the values that they mean.

Nothing here is shared with the readers: codes are put into their bits one by one, and a value is worked out from its
own code and scales, with each rounding to float32 written out. Rules: docs/quantized.md, where their sources stand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.self_attn.q_proj"
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One quantized weight: its tensors by name, what config.json says, and the values in float32."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    values: np.ndarray[Any, np.dtype[np.float32]]
    name: str = f"{MODULE}.weight"
    dtype: str = "bfloat16"
    files: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, encoded: Encoded, shards: int = 1, **config: object) -> Path:
    """A base of one quantized weight and a dense one; scales may lie in another file than codes."""
    folder.mkdir()
    settings = {"quantization_config": encoded.settings} if encoded.settings else {}
    described = {"model_type": "llama", "torch_dtype": encoded.dtype, **settings, **config}
    (folder / "config.json").write_text(json.dumps(described))
    for name, value in encoded.files.items():
        (folder / name).write_text(json.dumps(value))
    tensors = {**encoded.tensors, "model.norm.weight": torch.ones(4, dtype=getattr(torch, encoded.dtype))}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def single(value: Any) -> float:
    return float(np.float32(value))


def words(lines: list[list[int]], bits: int) -> torch.Tensor:
    """Lines of codes as 32-bit words: code i takes bits [i·bits, (i+1)·bits) of one long number, lowest first."""
    found = []
    for line in lines:
        number = sum(code << (place * bits) for place, code in enumerate(line))
        count = -(-len(line) * bits // 32)
        found.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.from_numpy(np.array(found, np.uint32).reshape(len(lines), -1).view(np.int32).copy())


def scales(chance: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(chance.uniform(0.001, 0.1, shape).astype(np.float32)).to(dtype)


def bnb4(kind: str = "nf4", block: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        count = out * inputs
        book = NF4 if kind == "nf4" else [single(value / 12) for value in _fp4_of_bnb()]
        codes = chance.integers(0, 16, count + count % 2)
        packed = np.array([codes[at] * 16 + codes[at + 1] for at in range(0, len(codes), 2)], np.uint8)
        if storage is not torch.uint8:
            assert len(packed) % 2 == 0
        blocks = -(-count // block)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [out, inputs]}
        weight = f"{MODULE}.weight"
        tensors = {
            weight: torch.from_numpy(packed).view(storage).reshape(-1, 1),
            f"{weight}.quant_map": torch.tensor(book, dtype=torch.float32),
        }
        if nested:
            inner = chance.integers(0, 256, blocks).astype(np.uint8)
            table = np.sort(chance.uniform(-1, 1, 256)).astype(np.float32)
            outer = chance.uniform(0.01, 0.1, -(-blocks // 256)).astype(np.float32)
            offset = single(chance.uniform(0.1, 0.2))
            absmax = [
                single(single(float(table[one]) * float(outer[at // 256])) + offset) for at, one in enumerate(inner)
            ]
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {
                f"{weight}.absmax": torch.from_numpy(inner),
                f"{weight}.nested_absmax": torch.from_numpy(outer),
                f"{weight}.nested_quant_map": torch.from_numpy(table),
            }
        else:
            given = chance.uniform(0.01, 0.2, blocks).astype(np.float32)
            absmax = [float(one) for one in given]
            tensors[f"{weight}.absmax"] = torch.from_numpy(given)
        text = json.dumps(state).encode()
        tensors[f"{weight}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        values = [single(float(np.float32(book[codes[at]])) * absmax[at // block]) for at in range(count)]
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        return Encoded(tensors, settings, np.array(values, np.float32).reshape(out, inputs))

    return encode


def _fp4_of_bnb() -> list[float]:
    """Twelve times its values by code. Source: bitsandbytes 0.50.2, functional.py `get_4bit_type`."""
    sizes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    return [*sizes, *(-size for size in sizes)]


def bnb8(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
    codes = chance.integers(-127, 128, (out, inputs)).astype(np.int8)
    scale = scales(chance, out)
    step = single(7.874015718698502e-3)
    values = [
        [single(single(float(code) * float(one)) * step) for code in line]
        for line, one in zip(codes, scale, strict=True)
    ]
    tensors = {
        f"{MODULE}.weight": torch.from_numpy(codes),
        f"{MODULE}.SCB": scale,
        f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Encoded(tensors, settings, np.array(values, np.float32).reshape(out, inputs))


def fp8_codes(chance: np.random.Generator, *shape: int) -> torch.Tensor:
    codes = chance.integers(0, 256, shape).astype(np.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def block_fp8(rows: int, cols: int, kind: str = "F32", end: str = "weight_scale_inv") -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        codes = fp8_codes(chance, out, inputs)
        grid = -(-out // rows), -(-inputs // cols)
        if kind == "F32":
            stored = scales(chance, *grid)
            meant = stored.double()
        else:
            exponents = torch.from_numpy(chance.integers(110, 130, grid).astype(np.uint8))
            stored = exponents if kind == "U8" else exponents.view(torch.float8_e8m0fnu)
            meant = 2.0 ** (exponents.double() - 127)
        wide = codes.double()
        values = [
            [single(float(wide[r, c]) * float(meant[r // rows, c // cols])) for c in range(inputs)] for r in range(out)
        ]
        settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, cols]}
        tensors = {f"{MODULE}.weight": codes, f"{MODULE}.{end}": stored}
        return Encoded(tensors, settings, np.array(values, np.float32).reshape(out, inputs))

    return encode


def fp8_whole(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
    codes, scale = fp8_codes(chance, out, inputs), scales(chance)
    values = (codes.double() * scale.double()).float().numpy()
    settings = {"quant_method": "fp8", "weight_block_size": None}
    return Encoded({f"{MODULE}.weight": codes, f"{MODULE}.weight_scale_inv": scale}, settings, values)


def mxfp4(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
    """A stack of two experts; the values are (experts, in, out)."""
    experts, groups = 2, -(-inputs // 32)
    name = "model.layers.0.mlp.experts.down_proj"
    codes = chance.integers(0, 16, (experts, out, groups * 32))
    exponents = chance.integers(120, 131, (experts, out, groups)).astype(np.uint8)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8).reshape(experts, out, groups, 16)
    values = np.empty((experts, groups * 32, out), np.float32)
    for expert, row, place in np.ndindex(experts, out, groups * 32):
        code = int(codes[expert, row, place])
        size = FP4[code % 8] * 2.0 ** (int(exponents[expert, row, place // 32]) - 127)
        values[expert, place, row] = -size if code >= 8 else size
    tensors = {f"{name}_blocks": torch.from_numpy(packed), f"{name}_scales": torch.from_numpy(exponents)}
    return Encoded(tensors, {"quant_method": "mxfp4"}, values, name)


def gptq(
    bits: int, group: int = 16, *, symmetric: bool = True, version: int = 1, act_order: bool = False, label: str = ""
) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        inputs = max(32, inputs // 32 * 32)
        size = inputs if group == -1 else group
        groups = -(-inputs // size)
        codes = chance.integers(0, 1 << bits, (inputs, out))
        zeros = np.full((groups, out), 1 << (bits - 1)) if symmetric else chance.integers(1, 1 << bits, (groups, out))
        kept = (zeros - (1 if version == 1 else 0)) % (1 << bits)
        index = chance.permutation(np.arange(inputs) // size) if act_order else np.arange(inputs) // size
        scale = scales(chance, groups, out, dtype=torch.float16)
        tensors = {
            f"{MODULE}.qweight": words(codes.T.tolist(), bits).T.contiguous(),
            f"{MODULE}.qzeros": words(kept.tolist(), bits),
            f"{MODULE}.scales": scale,
        }
        if act_order:
            tensors[f"{MODULE}.g_idx"] = torch.from_numpy(index.astype(np.int32))
        wide = scale.double().numpy()
        values = [
            [single(wide[index[i], o] * (int(codes[i, o]) - int(zeros[index[i], o]))) for i in range(inputs)]
            for o in range(out)
        ]
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": act_order,
            "checkpoint_format": label or ("gptq" if version == 1 else "gptq_v2"),
        }
        files = {"quantize_config.json": settings}
        return Encoded(tensors, settings, np.array(values, np.float32), dtype="float16", files=files)

    return encode


def awq(group: int) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        inputs, out = max(group, inputs // group * group), -(-out // 8) * 8
        codes, zeros = chance.integers(0, 16, (inputs, out)), chance.integers(0, 16, (inputs // group, out))
        scale = scales(chance, inputs // group, out, dtype=torch.float16)
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k holds this output of its eight

        def packed(matrix: Any) -> torch.Tensor:
            lines = [[int(line[8 * word + order[k]]) for word in range(out // 8) for k in range(8)] for line in matrix]
            return words(lines, 4)

        wide = scale.double().numpy()
        values = [
            [single(wide[i // group, o] * (int(codes[i, o]) - int(zeros[i // group, o]))) for i in range(inputs)]
            for o in range(out)
        ]
        tensors = {f"{MODULE}.qweight": packed(codes), f"{MODULE}.qzeros": packed(zeros), f"{MODULE}.scales": scale}
        settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return Encoded(tensors, settings, np.array(values, np.float32), dtype="float16")

    return encode


def _fp4_packed(chance: np.random.Generator, out: int, inputs: int) -> tuple[Any, torch.Tensor]:
    codes = chance.integers(0, 16, (out, inputs))
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    values = np.array(FP4)[codes % 8] * np.where(codes >= 8, -1.0, 1.0)
    return values, torch.from_numpy(packed)


def nvfp4(producer: str) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        inputs = max(16, inputs // 16 * 16)
        values, packed = _fp4_packed(chance, out, inputs)
        each = torch.from_numpy(chance.uniform(0.5, 100, (out, inputs // 16)).astype(np.float32))
        each = each.to(torch.float8_e4m3fn)
        total = single(chance.uniform(100, 2000) if producer == "compressed-tensors" else chance.uniform(1e-3, 1e-2))
        wide = each.double().numpy()
        scale = wide / total if producer == "compressed-tensors" else wide * total
        scale = scale.astype(np.float32).astype(np.float64)
        found = (values * np.repeat(scale, 16, axis=1)).astype(np.float32)
        if producer == "compressed-tensors":
            tensors = {
                f"{MODULE}.weight_packed": packed,
                f"{MODULE}.weight_scale": each,
                f"{MODULE}.weight_global_scale": torch.tensor([total]),
            }
            return Encoded(tensors, _groups("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), found)
        tensors = {f"{MODULE}.weight": packed, f"{MODULE}.weight_scale": each}
        tensors |= {f"{MODULE}.weight_scale_2": torch.tensor(total), f"{MODULE}.input_scale": torch.tensor(0.5)}
        settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
        beside = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
        return Encoded(tensors, settings, found, files={"hf_quant_config.json": beside})

    return encode


def _groups(kind: str, **weights: object) -> dict[str, Any]:
    group = {"targets": ["Linear"], "format": kind, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def compressed(bits: int, group: int = 0, *, symmetric: bool = True, act_order: bool = False) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        size = group or inputs
        groups, half = -(-inputs // size), 1 << (bits - 1)
        codes = chance.integers(-half, half, (out, inputs))
        zeros = chance.integers(-half, half, (out, groups)) if not symmetric else np.zeros((out, groups), int)
        scale = scales(chance, out, groups, dtype=torch.bfloat16)
        index = chance.permutation(np.arange(inputs) // size) if act_order else np.arange(inputs) // size
        per_word = 32 // bits
        padded = inputs if bits == 3 else -(-inputs // per_word) * per_word
        lines = [[int(code) + half for code in line] + [0] * (padded - inputs) for line in codes]
        tensors = {
            f"{MODULE}.weight_packed": words(lines, bits),
            f"{MODULE}.weight_scale": scale,
            f"{MODULE}.weight_shape": torch.tensor([out, inputs]),
        }
        if not symmetric:
            columns = [[int(zero) + half for zero in column] for column in zeros.T]
            tensors[f"{MODULE}.weight_zero_point"] = words(columns, bits).T.contiguous()
        if act_order:
            tensors[f"{MODULE}.weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        wide = scale.double().numpy()
        values = [
            [single(wide[o, index[i]] * (int(codes[o, i]) - int(zeros[o, index[i]]))) for i in range(inputs)]
            for o in range(out)
        ]
        strategy = "group" if group else "channel"
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
        if act_order:
            weights["actorder"] = "group"
        settings = _groups("pack-quantized", **weights, group_size=group or None)
        return Encoded(tensors, settings, np.array(values, np.float32).reshape(out, inputs))

    return encode


def eight_bits(kind: str, strategy: str) -> Encoder:
    def encode(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
        if kind == "float":
            codes = fp8_codes(chance, out, inputs)
        else:
            codes = torch.from_numpy(chance.integers(-127, 128, (out, inputs)).astype(np.int8))
        shape = {"channel": (out, 1), "tensor": (1,), "block": (-(-out // 8), -(-inputs // 8))}[strategy]
        scale = scales(chance, *shape, dtype=torch.bfloat16)
        wide = scale.double()
        if strategy == "block":
            wide = wide.repeat_interleave(8, 0).repeat_interleave(8, 1)[:out, :inputs]
        values = (codes.double() * wide).float().numpy()
        weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "group_size": None}
        more = {"block_structure": [8, 8]} if strategy == "block" else {}
        settings = _groups(f"{kind}-quantized", **weights, **more)
        return Encoded({f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scale}, settings, values)

    return encode


def mxfp4_linear(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
    inputs = max(32, inputs // 32 * 32)
    values, packed = _fp4_packed(chance, out, inputs)
    exponents = chance.integers(120, 131, (out, inputs // 32)).astype(np.uint8)
    found = (values * 2.0 ** (np.repeat(exponents, 32, axis=1).astype(float) - 127)).astype(np.float32)
    tensors = {f"{MODULE}.weight_packed": packed, f"{MODULE}.weight_scale": torch.from_numpy(exponents)}
    return Encoded(tensors, _groups("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), found)


def modelopt_fp8(chance: np.random.Generator, out: int, inputs: int) -> Encoded:
    codes, scale = fp8_codes(chance, out, inputs), scales(chance)
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scale, f"{MODULE}.input_scale": torch.tensor(0.5)}
    beside = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    values = (codes.double() * scale.double()).float().numpy()
    return Encoded(tensors, {}, values, files={"hf_quant_config.json": beside})


Encoder = Callable[[np.random.Generator, int, int], Encoded]

ENCODERS: dict[str, Encoder] = {
    "bitsandbytes NF4": bnb4(),
    "bitsandbytes NF4, double": bnb4(nested=True),
    "bitsandbytes FP4, blocks of 128": bnb4("fp4", 128),
    "bitsandbytes INT8": bnb8,
    "FP8, blocks of 8 x 16": block_fp8(8, 16),
    "FP8, E8M0 as bytes": block_fp8(16, 8, "U8"),
    "FP8, E8M0": block_fp8(16, 8, "E8M0"),
    "FP8, names of Mistral": block_fp8(8, 8, end="qscale_weight"),
    "FP8, one scale": fp8_whole,
    "MXFP4 of gpt-oss": mxfp4,
    "GPTQ, 2 bits": gptq(2),
    "GPTQ, 3 bits": gptq(3),
    "GPTQ, 4 bits": gptq(4),
    "GPTQ, 8 bits": gptq(8),
    "GPTQ, one group": gptq(4, -1),
    "GPTQ v2": gptq(4, version=2),
    "GPTQ, asymmetric, act-order": gptq(4, symmetric=False, act_order=True),
    "GPTQ v2, asymmetric": gptq(3, symmetric=False, version=2),
    "GPTQ v2 under the label of v1": gptq(4, version=2, label="gptq"),
    "AWQ": awq(16),
    "compressed-tensors, 4 bits": compressed(4, 16),
    "compressed-tensors, 3 bits": compressed(3, 16),
    "compressed-tensors, 8 bits a row": compressed(8),
    "compressed-tensors, 4 bits, asymmetric": compressed(4, 8, symmetric=False),
    "compressed-tensors, 4 bits, act-order": compressed(4, 8, act_order=True),
    "compressed-tensors, FP8 a row": eight_bits("float", "channel"),
    "compressed-tensors, FP8": eight_bits("float", "tensor"),
    "compressed-tensors, block FP8": eight_bits("float", "block"),
    "compressed-tensors, INT8": eight_bits("int", "channel"),
    "compressed-tensors, NVFP4": nvfp4("compressed-tensors"),
    "compressed-tensors, MXFP4": mxfp4_linear,
    "ModelOpt NVFP4": nvfp4("modelopt"),
    "ModelOpt FP8": modelopt_fp8,
}
