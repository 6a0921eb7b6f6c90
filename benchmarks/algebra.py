"""resize and combine against what others compute, on one thread, in one alternating run.

resize: a 4096 x 4096 update from rank 64 to 16. Rivals are the full singular value decomposition of ΔW, which is what
kohya's resize_lora.py did until its pull request 2240, and torch.svd_lowrank on ΔW (q = 16, niter = 2), both in
float32. Errors are relative, in float64.

combine: eight adapters of rank 16 for all linear layers of an 8B Llama, to rank 16. The rival reads the same files,
makes numpy's QR and singular value decompositions of the same factors and writes a file of the same tensors: what
cannot be left out. Then the peak memory of the command.

    python benchmarks/algebra.py [--rounds 5] [--layers 4] [--no-full]
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from loraformat.algebra.decomposition import decomposed, stored
from loraformat.algebra.factors import Product
from loraformat.model.tensors import DType

SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (4096, 4096)),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, 4096)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (14336, 4096)),
    "mlp.down_proj": (4096, 14336),
}
ADAPTERS, RANK = 8, 16
# The command, and at its end the most memory that it had.
COMMAND = """
import sys
from loraformat.cli import main
try:
    main(sys.argv[1:])
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr, end="")
"""
WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    """Both parts, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--no-full", action="store_true", help="leave the full decomposition out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    resizing(options.rounds, has_full=not options.no_full)
    with tempfile.TemporaryDirectory(prefix="loraformat-bench-") as folder:
        combining(Path(folder), options.rounds, options.layers)


def resizing(rounds: int, *, has_full: bool) -> None:
    """Times and errors of one update."""
    g = np.random.default_rng(0)
    spectrum = np.exp(-np.arange(64) / 12)
    left, right = (g.standard_normal(shape).astype("f4") for shape in ((4096, 64), (64, 4096)))
    factors = Product(left.astype("f8") * spectrum, right.astype("f8"))
    exact = factors.left @ factors.right

    def ours() -> tuple[np.ndarray, np.ndarray]:
        written, _ = stored(decomposed(factors, 16).factors(16), DType.F32)
        return written.left, written.right

    def lowrank() -> tuple[np.ndarray, np.ndarray]:
        u, s, v = torch.svd_lowrank(torch.from_numpy(left * spectrum.astype("f4")) @ torch.from_numpy(right), 16, 2)
        return (u * s).numpy(), v.T.numpy()

    def full() -> tuple[np.ndarray, np.ndarray]:
        u, s, v = torch.linalg.svd(torch.from_numpy(left * spectrum.astype("f4")) @ torch.from_numpy(right))
        return (u[:, :16] * s[:16]).numpy(), v[:16].numpy()

    best: dict[str, float] = {}
    error: dict[str, float] = {}
    for at in range(rounds):
        for rival in (ours, lowrank, *([full] if has_full and at == rounds // 2 else [])):
            seconds, found = timed(rival)
            best[rival.__name__] = min(best.get(rival.__name__, np.inf), seconds)
            error[rival.__name__] = float(
                np.linalg.norm(exact - found[0].astype("f8") @ found[1].astype("f8")) / np.linalg.norm(exact)
            )
    for name, seconds in best.items():
        print(f"resize  {name:<8} {seconds * 1e3:10.1f} ms  {seconds / best['ours']:8.1f} x  error {error[name]:.8f}")


def combining(folder: Path, rounds: int, layers: int) -> None:
    """Times of the command and of what it cannot leave out, and the command's memory."""
    adapters = [make(folder / str(number), number, layers) for number in range(ADAPTERS)]
    best = {"ours": np.inf, "bare": np.inf}
    for number in range(rounds):
        best["bare"] = min(best["bare"], timed(lambda: bare(adapters, folder / "bare.safetensors"))[0])
        command = [sys.executable, "-c", COMMAND, "combine", *map(str, adapters), "--rank", str(RANK)]
        command += ["-o", str(folder / f"out{number}")]
        seconds, done = timed(lambda c=command: subprocess.run(c, check=True, capture_output=True, text=True))
        best["ours"] = min(best["ours"], seconds)
        peak = int(done.stderr.splitlines()[-1].split()[1]) // 1024
    size = sum((adapter / WEIGHTS).stat().st_size for adapter in adapters) / 1e6
    print(f"combine {ADAPTERS} x r{RANK}, {layers} layers, {size:.0f} MB: {best['ours']:.2f} s", end=", ")
    print(f"bare {best['bare']:.2f} s: {best['ours'] / best['bare']:.2f} x, peak memory {peak} MB")


def bare(adapters: list[Path], out: Path) -> None:
    """Read, QR, SVD, write."""
    files = [load_file(adapter / WEIGHTS) for adapter in adapters]
    found = {}
    for name in files[0]:
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        down = np.concatenate([file[name] for file in files]).astype("f8")
        up = np.concatenate([file[other] for file in files], axis=1).astype("f8")
        q_up, r_up = np.linalg.qr(up)
        q_down, r_down = np.linalg.qr(down.T)
        u, s, v = np.linalg.svd(r_up @ r_down.T)
        found[other] = np.ascontiguousarray(q_up @ (u[:, :RANK] * s[:RANK])).astype("f4")
        found[name] = np.ascontiguousarray(v[:RANK] @ q_down.T).astype("f4")
    save_file(found, out)


def make(folder: Path, seed: int, layers: int) -> Path:
    """An adapter of random factors, as PEFT writes it."""
    g = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, cols) in SHAPES.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = g.standard_normal((RANK, cols), "f4")
            tensors[f"{path}.lora_B.weight"] = g.standard_normal((rows, RANK), "f4")
    save_file(tensors, folder / WEIGHTS)
    targets = sorted(name.rpartition(".")[2] for name in SHAPES)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    return folder


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main()
