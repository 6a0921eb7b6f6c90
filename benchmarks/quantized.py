"""`loraformat dequantize` and `merge --dequantize` of quantized bases against `cp` of the dense output.

For each scheme a Llama (for MXFP4 a gpt-oss) of random codes is written, as large as `--gigabytes` of bfloat16. In
alternating runs: `cp -r` of the dense output followed by `sync -f`, the same without it, `dequantize`, `merge
--dequantize` of an adapter on every linear layer, and where the scheme's library runs on the CPU its own way to a dense
checkpoint. The page cache is warm. Prints medians. Needs three times the size on disk.

    python benchmarks/quantized.py [--gigabytes 2] [--runs 3] [--schemes nf4,fp8] [--no-libraries] [--folder DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from merge import TABLES, Run, apart, spawn, start_up, tell, warm
from merge_memory import HIDDEN, INTERMEDIATE, LINEAR, VOCABULARY

SHARD_NBYTES = 256 << 20
RANK = 16
EXPERTS, WIDTH = 16, 2880  # of gpt-oss: its width, and half as many experts
SCHEMES = ("nf4", "nf4-double", "fp8", "mxfp4", "gptq", "awq")
LIBRARY = """
import sys, torch, transformers
base, out = sys.argv[1:]
more = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if "mxfp4" in base else {}
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **more)
if "nf4" in base:
    model = model.dequantize()
# transformers 5.23 cannot revert the loading of 4-bit weights: NotImplementedError.
model.save_pretrained(out, max_shard_size="1GB", save_original_format="nf4" not in base)
"""
LIBRARIES = {"nf4": "bitsandbytes", "nf4-double": "bitsandbytes", "fp8": "transformers", "mxfp4": "transformers"}


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--no-libraries", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        lead = start_up(folder, options.runs)
        tell(f"start-up of Python and loraformat: {lead:.2f} s, contained in every time of loraformat below")
        tell("scheme      tool                wall s  cpu s  peak MB  /durable cp  /warm cp")
        for scheme in options.schemes.split(","):
            compare(folder, scheme, options.gigabytes, options.runs, with_library=not options.no_libraries)
        print("\nall tables\n" + "\n".join(TABLES), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, scheme: str, gigabytes: float, runs: int, *, with_library: bool) -> None:
    """The lines of one scheme."""
    base, adapter, dense, out = (str(folder / name) for name in (scheme, "adapter", "dense", "out"))
    for path in (base, adapter, dense):
        shutil.rmtree(path, ignore_errors=True)
    apart(make, folder, scheme, int(gigabytes * 1e9))
    program = [sys.executable, "-m", "loraformat"]
    spawn([*program, "dequantize", base, "-o", dense], folder)
    durable = ["/bin/sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', dense, out]
    tools = {
        "cp, durable": durable,
        "cp, warm": ["cp", "-r", dense, out],
        "dequantize": [*program, "dequantize", base, "-o", out],
        "merge --dequantize": [*program, "merge", base, adapter, "-o", out, "--dequantize"],
    }
    found: dict[str, list[Run]] = {tool: [] for tool in tools}
    for _ in range(runs):
        for tool, command in tools.items():
            warm(Path(base)), warm(Path(dense))
            found[tool].append(spawn(command, folder))
    library = LIBRARIES.get(scheme, "")
    if with_library and library and importlib.util.find_spec(library) is not None:
        found[library] = [spawn([sys.executable, "-c", LIBRARY, base, out], folder)]
    copied = [statistics.median(run.wall for run in found[tool]) for tool in ("cp, durable", "cp, warm")]
    size = sum(path.stat().st_size for path in Path(dense).iterdir())
    tell(f"{scheme}: {size / 1e9:.2f} GB dense, cp writes {size / copied[0] / 1e9:.2f} GB/s to the disk")
    for tool, those in found.items():
        wall, cpu, peak = (statistics.median(getattr(run, name) for run in those) for name in ("wall", "cpu", "peak"))
        ratios = f"{wall / copied[0]:12.2f} {wall / copied[1]:9.2f}"
        tell(f"{scheme:<11} {tool:<19} {wall:6.2f} {cpu:6.2f} {peak / 1e6:8.0f} {ratios}")


def make(folder: Path, scheme: str, nbytes: int) -> None:
    """A base in a scheme, and an adapter for all of its linear layers."""
    if scheme == "mxfp4":
        make_gpt_oss(folder / scheme, folder / "adapter", nbytes)
        return
    layer_nbytes = 2 * sum(rows * cols for rows, cols in LINEAR.values())
    layers = max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / layer_nbytes))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "quantization_config": SETTINGS[scheme],
    }
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in LINEAR.items()}
    write(folder / scheme, config, llama(scheme, layers))
    make_adapter(folder / "adapter", modules)


def llama(scheme: str, layers: int) -> Iterator[dict[str, np.ndarray | tuple[str, np.ndarray]]]:
    """The tensors of a Llama, a module at a time."""
    chance = np.random.default_rng(0)
    yield {"model.embed_tokens.weight": bfloat16(chance, VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, (out, inputs) in LINEAR.items():
            yield encode(scheme, f"model.layers.{layer}.{name}", chance, out, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield {f"model.layers.{layer}.{norm}.weight": bfloat16(chance, HIDDEN)}
    yield {"model.norm.weight": bfloat16(chance, HIDDEN), "lm_head.weight": bfloat16(chance, VOCABULARY, HIDDEN)}


GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
SETTINGS = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", **GPTQ},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}
# Source: bitsandbytes 0.50.2, functional.py `get_4bit_type`.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def encode(scheme: str, module: str, chance: np.random.Generator, out: int, inputs: int) -> dict[str, object]:
    """Random codes of a module, with scales that make its values about as large as weights are."""

    def scales(*shape: int) -> np.ndarray:
        return chance.uniform(0.001, 0.1, shape).astype(np.float32)

    weight = f"{module}.weight"
    if scheme == "fp8":
        codes = chance.integers(0, 256, (out, inputs), np.uint8)
        codes[codes % 128 == 127] = 0  # NaN
        grid = scales(-(-out // 128), -(-inputs // 128)) / 100
        return {weight: ("F8_E4M3", codes), f"{weight}_scale_inv": grid}
    if scheme in ("gptq", "awq"):
        groups, across = inputs // 128, scheme == "awq"
        shape = (inputs, out // 8) if across else (inputs // 8, out)
        zeros = np.full((groups, out // 8), 0x77777777, np.int32)
        words = chance.integers(-(1 << 31), 1 << 31, shape, np.int64).astype(np.int32)
        tensors = {f"{module}.qweight": words, f"{module}.qzeros": zeros}
        tensors[f"{module}.scales"] = (scales(groups, out) / 10).astype(np.float16)
        return tensors
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, inputs]}
    blocks = out * inputs // 64
    tensors = {weight: chance.integers(0, 256, (out * inputs // 2, 1), np.uint8)}
    tensors[f"{weight}.quant_map"] = np.array(NF4, np.float32)
    if scheme == "nf4":
        tensors[f"{weight}.absmax"] = scales(blocks)
    else:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        tensors[f"{weight}.absmax"] = chance.integers(0, 256, blocks, np.uint8)
        tensors[f"{weight}.nested_absmax"] = scales(-(-blocks // 256))
        tensors[f"{weight}.nested_quant_map"] = np.linspace(-0.9, 1, 256, dtype=np.float32)
    text = json.dumps(state).encode()
    tensors[f"{weight}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return tensors


def make_gpt_oss(folder: Path, adapter: Path, nbytes: int) -> None:
    """A gpt-oss with experts in MXFP4 and dense attention, and an adapter for its attention."""
    layers = max(1, round(nbytes / (2 * EXPERTS * 3 * WIDTH * WIDTH)))
    attention = {"q_proj": (4096, WIDTH), "k_proj": (512, WIDTH), "v_proj": (512, WIDTH), "o_proj": (WIDTH, 4096)}
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_local_experts": EXPERTS,
        "vocab_size": 1024,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }

    def tensors() -> Iterator[dict[str, object]]:
        chance = np.random.default_rng(0)
        yield {f"{name}.weight": bfloat16(chance, 1024, WIDTH) for name in ("model.embed_tokens", "lm_head")}
        yield {"model.norm.weight": bfloat16(chance, WIDTH)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            for name, (out, inputs) in attention.items():
                yield {f"{prefix}.self_attn.{name}.weight": bfloat16(chance, out, inputs)}
                yield {f"{prefix}.self_attn.{name}.bias": bfloat16(chance, out)}
            yield {f"{prefix}.self_attn.sinks": bfloat16(chance, 64)}
            yield {f"{prefix}.mlp.router.weight": bfloat16(chance, EXPERTS, WIDTH)}
            yield {f"{prefix}.mlp.router.bias": bfloat16(chance, EXPERTS)}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield {f"{prefix}.{norm}.weight": bfloat16(chance, WIDTH)}
            for name, out in (("gate_up_proj", 2 * WIDTH), ("down_proj", WIDTH)):
                experts = f"{prefix}.mlp.experts.{name}"
                codes = chance.integers(0, 256, (EXPERTS, out, WIDTH // 32, 16), np.uint8)
                powers = chance.integers(117, 122, (EXPERTS, out, WIDTH // 32), np.uint8)
                yield {f"{experts}_blocks": codes, f"{experts}_scales": powers}
                yield {f"{experts}_bias": bfloat16(chance, EXPERTS, out)}

    write(folder, config, tensors())
    modules = {
        f"model.layers.{layer}.self_attn.{name}": at for layer in range(layers) for name, at in attention.items()
    }
    make_adapter(adapter, modules)


def bfloat16(chance: np.random.Generator, *shape: int) -> tuple[str, np.ndarray]:
    """Random weights."""
    return "BF16", (chance.standard_normal(shape, np.float32) * 0.02).view(np.uint32) >> 16


CODES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "U8"}


def write(folder: Path, config: dict[str, object], tensors: Iterator[dict[str, object]]) -> None:
    """A checkpoint in files of a quarter of a gigabyte, and its index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shard: dict[str, tuple[str, np.ndarray]] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for tensor, (dtype, values) in shard.items():
            nbytes = values.nbytes
            header[tensor] = {"dtype": dtype, "shape": values.shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, values in shard.values():
                file.write(np.ascontiguousarray(values).data)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for some in tensors:
        for name, value in some.items():
            dtype, values = value if isinstance(value, tuple) else (CODES[str(value.dtype)], value)
            shard[name] = dtype, values.astype(np.uint16) if dtype == "BF16" else values
        if sum(values.nbytes for _, values in shard.values()) > SHARD_NBYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> None:
    """A PEFT adapter for some linear layers."""
    chance = np.random.default_rng(1)
    folder.mkdir()

    def tensors() -> dict[str, np.ndarray]:
        found = {}
        for module, (out, inputs) in modules.items():
            name = f"base_model.model.{module}"
            found[f"{name}.lora_A.weight"] = chance.standard_normal((RANK, inputs), np.float32) * np.float32(0.02)
            found[f"{name}.lora_B.weight"] = chance.standard_normal((out, RANK), np.float32) * np.float32(0.02)
        return found

    from safetensors.numpy import save_file

    save_file(tensors(), folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "example/base"}))


if __name__ == "__main__":
    main()
