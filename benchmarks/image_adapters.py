"""Detection and `inspect` of a kohya file of 2,000 tensors against `inspect` of a PEFT adapter of as many.

Both are of rank 4 with small layers, so that names and headers are what is read. Runs alternate in fresh processes,
each of which times itself without its start-up; medians.

    python benchmarks/image_adapters.py [--tensors 2000] [--runs 9] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

CHILD = """
import sys, time
from loraformat.jobs.inspect import inspect
start = time.perf_counter()
report = inspect(sys.argv[1])
str(report)
print(time.perf_counter() - start)
"""


def factors(names: list[str], spellings: tuple[str, str], rows: int = 64) -> dict[str, torch.Tensor]:
    """Two factors of every module."""
    down, up = spellings
    return {f"{name}.{down}": torch.zeros(4, 64) for name in names} | {
        f"{name}.{up}": torch.ones(rows, 4) for name in names
    }


def kohya(folder: Path, tensors: int) -> Path:
    """FLUX.1 with alphas: modules that are one in diffusers too, blocks until there are enough tensors."""
    leaves = ("img_attn_proj", "txt_attn_proj", "img_mod_lin", "txt_mod_lin")
    names = [f"lora_unet_double_blocks_{n // 4}_{leaves[n % 4]}" for n in range(tensors // 3)]
    content = factors(names, ("lora_down.weight", "lora_up.weight"))
    path = folder / "lora.safetensors"
    save_file(content | {f"{name}.alpha": torch.tensor(2.0) for name in names}, path)
    return path


def peft(folder: Path, tensors: int) -> Path:
    """A PEFT folder of a language model."""
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [f"base_model.model.model.layers.{n // 4}.self_attn.{leaves[n % 4]}" for n in range(tensors // 2)]
    target = folder / "peft"
    target.mkdir()
    save_file(factors(names, ("lora_A.weight", "lora_B.weight")), target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(leaves)}
    (target / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    return target


def seconds(path: Path) -> float:
    """What one process took to inspect an adapter."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = {"kohya": kohya(Path(folder), options.tensors), "peft": peft(Path(folder), options.tensors)}
        found: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(options.runs):
            for name, path in paths.items():
                found[name].append(seconds(path))
    medians = {name: statistics.median(each) for name, each in found.items()}
    for name, median in medians.items():
        print(f"{name:6} {median * 1000:7.1f} ms  (least {min(found[name]) * 1000:.1f})")
    print(f"kohya / peft: {medians['kohya'] / medians['peft']:.2f}")


if __name__ == "__main__":
    main()
