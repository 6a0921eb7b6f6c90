"""Peak memory of `loraformat merge` on a Llama-shaped bfloat16 base with an adapter on every linear layer.

Makes a sharded base of about the wanted size (seeded random values) and a PEFT adapter, merges them in child processes
with several `--jobs` and `--memory`, and prints wall time, peak resident memory and whether all outputs are equal.

    python benchmarks/merge_memory.py [--gigabytes 1] [--rank 16] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY, SHARD_NBYTES = 2048, 5632, 32000, 256 << 20
QUIET = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_base(folder: Path, nbytes: int) -> int:
    """Write the base; returns its number of layers."""
    import torch
    from safetensors.torch import save_file

    layer_nbytes = 2 * sum(rows * cols for rows, cols in LINEAR.values())
    layers = max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / layer_nbytes))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in LINEAR.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        filled += 2 * math.prod(shape)
        if filled > SHARD_NBYTES and shards[-1]:
            shards.append([])
            filled = 2 * math.prod(shape)
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {n: (torch.randn(shapes[n], generator=generator) * 0.02).to(torch.bfloat16) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return layers


def make_adapter(folder: Path, layers: int, rank: int) -> None:
    """Write a PEFT adapter for every linear layer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (rows, cols) in LINEAR.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, cols, generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in LINEAR)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "example/base"}))


def make(folder: Path, nbytes: int, rank: int) -> None:
    """Write `base` and `adapter` and say how large they are."""
    layers = make_base(folder / "base", nbytes)
    make_adapter(folder / "adapter", layers, rank)
    size, factors = (sum(p.stat().st_size for p in (folder / name).iterdir()) for name in ("base", "adapter"))
    print(f"base {size / 1e9:.2f} GB, {layers} layers; adapter {factors / 1e6:.1f} MB, rank {rank}", flush=True)


def run(arguments: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of one `loraformat` call in a child."""
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-m", "loraformat", *arguments], os.environ, file_actions=QUIET
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"loraformat {' '.join(arguments)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def digest(folder: Path) -> str:
    """One hash over the names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def main() -> None:
    """Make, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        # In a process of its own: a child starts with the peak of its parent, which must therefore stay small.
        work = (folder, int(options.gigabytes * 1e9), options.rank)
        maker = multiprocessing.get_context("spawn").Process(target=make, args=work)
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the base could not be made")
        print("jobs  memory     wall s   peak MB   output")
        seen = set()
        for jobs, memory in [(1, "64MiB"), (2, "64MiB"), (1, "16MiB"), (2, "256MiB")]:
            out = folder / "out"
            paths = [str(folder / "base"), str(folder / "adapter"), "-o", str(out)]
            wall, peak = run(["merge", *paths, "--jobs", str(jobs), "--memory", memory])
            seen.add(digest(out))
            shutil.rmtree(out)
            print(f"{jobs:4}  {memory:>7}  {wall:9.2f}  {peak / 1e6:8.0f}   {len(seen)} distinct so far", flush=True)
        if len(seen) != 1:
            raise SystemExit("outputs differ")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
