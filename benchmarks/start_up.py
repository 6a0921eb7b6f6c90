"""What each verb costs before its work begins: processor and wall time on the smallest inputs, and what it imports.

Every verb runs once in each of several rounds, so that a slow minute of the machine meets all of them. Prints the
minimum of processor time, the median of wall time and peak memory, beside Python alone and Python with numpy.

    python benchmarks/start_up.py [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ADAPTER, OTHER = FIXTURES / "good" / "peft" / "tiny-llama", FIXTURES / "good" / "peft" / "dora"
BASE, HAND_WRITTEN = FIXTURES / "minigpt" / "base", FIXTURES / "minigpt" / "lora_adapter"
PROBE = """
import sys
from loraformat.cli import main
try:
    main(sys.argv[1:], prog_name="loraformat")
except SystemExit:
    pass
print(len(sys.modules), *(name for name in ("numpy", "torch", "rich", "huggingface_hub") if name in sys.modules))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """Processor and wall milliseconds, and peak memory in megabytes, of one process."""

    cpu: float
    wall: float
    peak: float


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = verbs(Path(folder))
        found: dict[str, list[Run]] = defaultdict(list)
        for _ in range(options.runs):
            for name, command in commands.items():
                found[name].append(measured(command, Path(folder)))
        print("verb                        cpu ms  wall ms  peak MB  modules")
        for name, command in commands.items():
            runs = found[name]
            figures = min(run.cpu for run in runs), statistics.median(run.wall for run in runs)
            peak = statistics.median(run.peak for run in runs)
            print(f"{name:<26} {figures[0]:>7.0f}  {figures[1]:>7.0f}  {peak:>7.0f}  {imported(command, Path(folder))}")


def verbs(folder: Path) -> Mapping[str, Sequence[str]]:
    """Name → command."""
    tool = [sys.executable, "-m", "loraformat"]
    out = str(folder / "out")
    merged = str(folder / "merged")
    merge = ["merge", str(BASE), str(HAND_WRITTEN), "--alpha", "1"]
    make_small(folder)
    small = {
        kind: [*tool, "merge", str(folder / "base"), str(folder / kind), "-o", out]
        for kind in ("lora", "dora", "table")
    }
    subprocess.run([*tool, *merge, "-o", merged], check=True, capture_output=True)
    return {
        "python": [sys.executable, "-c", "pass"],
        "python, numpy": [sys.executable, "-c", "import numpy"],
        "--help": [*tool, "--help"],
        "--version": [*tool, "--version"],
        "formats": [*tool, "formats"],
        "explain": [*tool, "explain", "LF206"],
        "inspect": [*tool, "inspect", str(ADAPTER)],
        "inspect --norms": [*tool, "inspect", str(ADAPTER), "--norms"],
        "validate": [*tool, "validate", str(ADAPTER)],
        "validate --deep": [*tool, "validate", str(ADAPTER), "--deep"],
        "convert": [*tool, "convert", str(ADAPTER), "--to", "native", "-o", out],
        "diff": [*tool, "diff", str(ADAPTER), str(ADAPTER)],
        "plot": [*tool, "plot", str(ADAPTER), "-o", f"{out}.html"],
        "estimate": [*tool, "estimate", str(BASE), "--rank", "8", "--targets", "all-linear"],
        "merge": [*tool, *merge, "-o", out],
        **{f"merge, {kind}": command for kind, command in small.items()},
        "verify": [*tool, "verify", merged],
    }


def make_small(folder: Path) -> None:
    """A base of one layer, and three adapters for it: LoRA, DoRA, and a table that is replaced."""
    import numpy as np
    from safetensors.numpy import save_file

    chance = np.random.default_rng(0)
    weight = chance.standard_normal((64, 48)).astype(np.float32)
    tensors = {"lora_A.weight": weight[:4].copy(), "lora_B.weight": weight[:, :4].copy()}
    parts = {
        "lora": tensors,
        "dora": {**tensors, "lora_magnitude_vector": abs(weight[:, 0])},
        "table": {"weight": weight},
    }
    (folder / "base").mkdir()
    save_file({"proj.weight": weight}, folder / "base" / "model.safetensors")
    for kind, found in parts.items():
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": kind == "dora", "target_modules": ["proj"]}
        if kind == "table":
            config |= {"target_modules": ["none"], "modules_to_save": ["proj"]}
        (folder / kind).mkdir()
        save_file(
            {f"base_model.model.proj.{name}": value for name, value in found.items()},
            folder / kind / "adapter_model.safetensors",
        )
        (folder / kind / "adapter_config.json").write_text(json.dumps(config))


def measured(command: Sequence[str], folder: Path) -> Run:
    """One run of a command; what it wrote is removed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.html").unlink(missing_ok=True)
    return Run(1000 * (usage.ru_utime + usage.ru_stime), 1000 * wall, usage.ru_maxrss / 1e3)


def imported(command: Sequence[str], folder: Path) -> str:
    """How many modules a verb imports, and which of the heavy ones."""
    if command[1:3] != ["-m", "loraformat"]:
        return ""
    done = subprocess.run([sys.executable, "-c", PROBE, *command[3:]], capture_output=True, text=True, check=False)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.html").unlink(missing_ok=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
