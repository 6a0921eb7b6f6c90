"""`loraformat inspect` against doing it the plain way, on the shapes of an 8B Llama.

Norms of 448 factors of rank 16 against materialising every product; spectra against torch.linalg.svd of products, for
one weight of each shape, and for all 224 by what one of its shape took; and what reading two gigabytes of base costs
against `cp` of them. Each tool is a child of its own that times itself without its start-up; runs alternate; medians,
and the peak memory of the child. Needs twice the size of the base on disk.

    python benchmarks/inspection.py [--gigabytes 2] [--runs 5] [--jobs 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAYERS = 32
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SVD_OF = {"self_attn.k_proj": 2, "self_attn.q_proj": 2, "mlp.down_proj": 3}  # and how many of a layer are like it

# Each child prints its seconds as the last line; {0} is the folder, {1} the number of threads.
START = """
import sys, time, torch
from loraformat.io import load_adapter
torch.set_num_threads(int(sys.argv[2]))
adapter = load_adapter(sys.argv[1] + "/adapter")
start = time.perf_counter()
"""
END = "\nprint(time.perf_counter() - start)\n"
NORMS = (
    START
    + """
from loraformat.jobs.measure.figures import figures_of
records = figures_of(adapter, jobs=int(sys.argv[2]))
"""
    + END
)
SPECTRA = (
    START
    + """
from loraformat.jobs.measure.figures import figures_of
records = figures_of(adapter, spectrum=True, jobs=int(sys.argv[2]))
"""
    + END
)
PRODUCTS = (
    START
    + """
for chain in adapter.updates.values():
    for update in chain:
        (update.scale * (update.up.torch().float() @ update.down.torch().float())).norm().item()
"""
    + END
)
ONE_SPECTRUM = (
    START
    + """
from loraformat.algebra import spectrum
update = adapter.updates[f"model.layers.0.{sys.argv[3]}.weight"][0]
for _ in range(20):
    spectrum(update)
print((time.perf_counter() - start) / 20)
"""
)
ONE_SVD = (
    START
    + """
update = adapter.updates[f"model.layers.0.{sys.argv[3]}.weight"][0]
torch.linalg.svd(update.up.torch().float() @ update.down.torch().float(), full_matrices=False)
"""
    + END
)
BASE = (
    START
    + """
from loraformat.containers import open_checkpoint
from loraformat.jobs.measure.changes import changes_of
changes_of(open_checkpoint(sys.argv[1] + "/base"), adapter, jobs=int(sys.argv[2]))
"""
    + END
)
NOTHING = START + END


@dataclass(frozen=True, slots=True)
class Run:
    """One child: its own seconds, wall seconds with start-up, peak resident bytes."""

    seconds: float
    peak: int


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        python(MAKE, folder, str(options.gigabytes))
        empty = python(NOTHING, folder, str(options.jobs))
        print(f"Python, torch and the headers alone: peak {empty.peak / 1e6:.0f} MB, contained in every peak below")
        head = f"{'':44}{'ours s':>9}{'plain s':>9}{'plain / ours':>14}{'ours MB':>9}{'plain MB':>10}"
        print(head, flush=True)
        jobs = str(options.jobs)
        told("norms of 448 factors, products materialised", folder, (NORMS, jobs), (PRODUCTS, jobs), options.runs)
        spectra(folder, jobs, options.runs)
        streaming(folder, jobs, options.runs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


MAKE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[3])
from inspection import LAYERS, SHAPES
folder, wanted = Path(sys.argv[1]), float(sys.argv[2]) * 1e9
g = torch.Generator().manual_seed(0)
(folder / "adapter").mkdir()
factors = {}
for layer in range(LAYERS):
    for name, (rows, cols) in SHAPES.items():
        module = f"base_model.model.model.layers.{layer}.{name}"
        factors[f"{module}.lora_A.weight"] = (torch.randn(16, cols, generator=g) / cols**0.5).bfloat16()
        factors[f"{module}.lora_B.weight"] = (torch.randn(rows, 16, generator=g) * 0.02).bfloat16()
save_file(factors, folder / "adapter" / "adapter_model.safetensors")
targets = sorted(name.split(".")[1] for name in SHAPES)
config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets, "base_model_name_or_path": "x"}
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
(folder / "base").mkdir()
layer, total, weight_map = 0, 0, {}
while total < wanted and layer < LAYERS:
    block = {
        f"model.layers.{layer}.{name}.weight": (torch.randn(*shape, generator=g) * 0.02).bfloat16()
        for name, shape in SHAPES.items()
    }
    save_file(block, folder / "base" / f"model-{layer:05}.safetensors")
    weight_map |= dict.fromkeys(block, f"model-{layer:05}.safetensors")
    total += sum(value.nbytes for value in block.values())
    layer += 1
index = {"metadata": {"total_size": total}, "weight_map": weight_map}
(folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
(folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
print(0.0)
"""


def told(label: str, folder: Path, ours: tuple[str, ...], plain: tuple[str, ...], runs: int) -> Run:
    """A line of the table, both tools in turn; gives back what the plain way took."""
    pairs = [(python(ours[0], folder, *ours[1:]), python(plain[0], folder, *plain[1:])) for _ in range(runs)]
    return line(label, [pair[0] for pair in pairs], [pair[1] for pair in pairs])


def spectra(folder: Path, jobs: str, runs: int) -> None:
    """Singular values of one weight of each shape, and of all."""
    decomposed, peak = 0.0, 0
    for name, alike in SVD_OF.items():
        rows, cols = SHAPES[name]
        label = f"spectrum of {rows} x {cols}, torch.linalg.svd"
        svd = told(label, folder, (ONE_SPECTRUM, jobs, name), (ONE_SVD, jobs, name), min(2, runs))
        decomposed, peak = decomposed + LAYERS * alike * svd.seconds, max(peak, svd.peak)
    ours = [python(SPECTRA, folder, jobs) for _ in range(runs)]
    line(f"spectra of all {LAYERS * len(SHAPES)}, svd by its shape", ours, [Run(decomposed, peak)])


def line(label: str, ours: list[Run], plain: list[Run]) -> Run:
    """Medians of both, and their ratio; gives back those of the plain way."""
    mine, theirs = (statistics.median(run.seconds for run in runs) for runs in (ours, plain))
    peaks = [max(run.peak for run in runs) / 1e6 for runs in (ours, plain)]
    print(f"{label:44}{mine:9.4g}{theirs:9.4g}{theirs / mine:14.4g}{peaks[0]:9.0f}{peaks[1]:10.0f}", flush=True)
    return Run(theirs, max(run.peak for run in plain))


def streaming(folder: Path, jobs: str, runs: int) -> None:
    """Reading the base with everything that is counted on the way, against cp of the same files."""
    nbytes = sum(path.stat().st_size for path in (folder / "base").iterdir())
    measured, copied = [], []
    for _ in range(runs):
        for path in sorted((folder / "base").glob("*.safetensors")):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        measured.append(python(BASE, folder, jobs))
        copied.append(python(COPY, folder, jobs))
        shutil.rmtree(folder / "copy")
    line(f"--base {nbytes / 1e9:.2f} GB (warm), cp and sync", measured, copied)


COPY = """
import subprocess, sys, time
start = time.perf_counter()
subprocess.run(["cp", "-r", sys.argv[1] + "/base", sys.argv[1] + "/copy"], check=True)
subprocess.run(["sync", "-f", sys.argv[1] + "/copy"], check=True)
print(time.perf_counter() - start)
"""


def python(script: str, folder: Path, *arguments: str) -> Run:
    """Run a script in a child of its own."""
    reading, writing = os.pipe()
    more = [str(Path(__file__).parent)] if script is MAKE else []
    command = [sys.executable, "-P", "-c", script, str(folder), *arguments, *more]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    with os.fdopen(reading) as output:
        text = output.read()
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"a child failed: {json.dumps(text[-400:])}")
    return Run(float(text.split()[-1]), usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
