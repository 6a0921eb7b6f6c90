"""Wall time of `loraformat validate --format json` on header-only work: a usual adapter, and one of 200,000 tensors.

Writes both adapters with holes for values (headers are all that is read), runs the command several times in processes
of its own, and prints medians, beside what it takes to start Python, to import click, and to open the same file with
the safetensors library. Also prints which modules the command imports.

    python benchmarks/validate.py [--runs 11] [--large-runs 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINEAR = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
RANK = 16
PROBE = """
import sys
from loraformat.cli import main
try:
    main(sys.argv[1:], prog_name="loraformat")
except SystemExit:
    pass
print(*sorted(sys.modules), file=sys.stderr)
"""
SAFE_OPEN = "import sys, safetensors; f = safetensors.safe_open(sys.argv[1], framework='np'); len(f.keys())"


def make(folder: Path, layers: int, experts: int) -> int:
    """A PEFT adapter on every linear module of a Llama-shaped model; returns its number of tensors."""
    entries: dict[str, object] = {}
    position = 0
    for layer in range(layers):
        for name, (rows, cols) in LINEAR.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            paths = (
                [path]
                if experts == 1 or "mlp" not in name
                else [path.replace("mlp.", f"mlp.experts.{expert}.") for expert in range(experts)]
            )
            for module in paths:
                for part, shape in (("lora_A", [RANK, cols]), ("lora_B", [rows, RANK])):
                    nbytes = 2 * shape[0] * shape[1]
                    offsets = [position, position + nbytes]
                    entries[f"{module}.{part}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
                    position += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    folder.mkdir(parents=True)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    config = {
        "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 32,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted({name.partition(".")[2] for name in LINEAR}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return len(entries)


def median(command: list[str], runs: int) -> tuple[float, float]:
    """Seconds of wall time and of processor time, medians, after one run that does not count."""
    walls, processors = [], []
    for number in range(runs + 1):
        before = os.times()
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        wall, after = time.perf_counter() - start, os.times()
        if number:
            walls.append(wall)
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            processors.append(spent)
    return statistics.median(walls), statistics.median(processors)


def modules_of(arguments: list[str]) -> list[str]:
    """Names of all modules that a run of the command has imported at its end."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    return done.stderr.split()


def main() -> None:
    """Make the adapters, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--large-runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        usual, large = folder / "usual", folder / "large"
        counts = make(usual, 32, 1), make(large, 64, 520)
        # As pip installs it, with byte code: compiling the sources anew in each run would be all that is measured.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        script = str(Path(sys.executable).with_name("loraformat"))
        validate = [script, "validate", "--format", "json", "--isolated"]
        rows = [
            ("python -c pass", [sys.executable, "-c", "pass"], options.runs),
            ("python -c 'import click'", [sys.executable, "-c", "import click"], options.runs),
            ("loraformat --help", [script, "--help"], options.runs),
            (f"validate --format json, {counts[0]:,} tensors", [*validate, str(usual)], options.runs),
            (f"validate --format json, {counts[1]:,} tensors", [*validate, str(large)], options.large_runs),
            (
                f"safe_open(…).keys(), {counts[1]:,} tensors",
                [sys.executable, "-c", SAFE_OPEN, str(large / "adapter_model.safetensors")],
                options.large_runs,
            ),
        ]
        print(f"{'':46} {'wall ms':>9} {'cpu ms':>9}")
        for title, command, runs in rows:
            wall, processor = median(command, runs)
            print(f"{title:46} {1000 * wall:9.0f} {1000 * processor:9.0f}", flush=True)
        modules = modules_of(["validate", "--format", "json", "--isolated", str(usual)])
        ours = [name for name in modules if name.partition(".")[0] == "loraformat"]
        packages = sorted({name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names))
        print(f"modules imported: {len(modules)}, {len(ours)} of them ours; third party: {', '.join(packages)}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
