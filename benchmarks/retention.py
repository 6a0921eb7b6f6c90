"""How much of an update survives a merge, against its size, and what the remedies give.

One base of bfloat16 weights, normally distributed, and rank-16 adapters for all of its linear layers, scaled so that
the norm of the update is a given share of the norm of the weight. `loraformat merge` runs once for each. The shares are
those of its report: <W' - W, D> / <D, D> over all weights, W' the written and W the base's value, D the
exact update; and the share of elements that did not change.

    python benchmarks/retention.py [--layers 2] [--sizes 1e-1,1e-2,1e-3,1e-4]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

LINEAR = {"self_attn.q_proj": (1024, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816)}
RANK = 16
REMEDIES = {
    "bfloat16, nearest": {},
    "bfloat16, stochastic": {"rounding": "stochastic"},
    "float16 output": {"dtype": "float16"},
    "float32 output": {"dtype": "float32"},
}


def main() -> None:
    """Make, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sizes", default="1e-1,1e-2,1e-3,1e-4")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraformat-bench-") as name:
        folder = Path(name)
        make_base(folder / "base", options.layers)
        print(f"{'|D|/|W|':>8}  {'output':<22} {'survives':>9} {'unchanged':>10} {'max |D|':>9}")
        for size in map(float, options.sizes.split(",")):
            make_adapter(folder / f"adapter-{size:g}", options.layers, size)
            for label, fields in REMEDIES.items():
                print(f"{size:8.0e}  {label:<22} {figures(folder, size, fields)}", flush=True)


def figures(folder: Path, size: float, fields: dict[str, str]) -> str:
    """The line of one merge."""
    from loraformat.jobs.merge import merge

    out = folder / "out"
    report = merge(str(folder / "base"), [str(folder / f"adapter-{size:g}")], str(out), **fields)
    shutil.rmtree(out)
    weights = report.data.retention
    unchanged = sum(weight.unchanged for weight in weights) / len(weights)
    largest = max(weight.largest for weight in weights)
    return f"{report.data.retained:9.2%} {unchanged:10.2%} {largest:9.1e}"


def make_base(folder: Path, layers: int) -> None:
    """Weights of standard deviation 0.02."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {
        f"model.layers.{layer}.{name}.weight": (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for layer in range(layers)
        for name, shape in LINEAR.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, layers: int, size: float) -> None:
    """Factors whose product has about `size` times the norm of the weight: |BA| is near sqrt(rank · rows · cols)."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (rows, cols) in LINEAR.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, cols, generator=generator)
            up = torch.randn(rows, RANK, generator=generator) * 0.02 * size / math.sqrt(RANK)
            tensors[f"{module}.lora_B.weight"] = up
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in LINEAR)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    config |= {"base_model_name_or_path": "example/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
