"""extract against mergekit-extract-lora on a pair of models, and against decompositions of one 4096 x 4096 difference.

The pair is a Llama in bfloat16 and the same with a change of rank 64 and noise in every linear layer, ‖Δ‖/‖W‖ = 0.01;
it is made here from a seed, 2 x 2.2 GB with 22 layers. Tools run in child processes, in turn: wall time, peak resident
memory, the error ‖Δ − written‖ / ‖Δ‖ over all layers, computed here in float64 from the files, and whether PEFT loads
the folder. mergekit is given by its own virtual environment, since it has other dependencies.

The one difference is decomposed in this process on one thread, in turn: extract's measure and search with 3 passes, the
full singular value decomposition of numpy, and torch.svd_lowrank (q = rank, niter = 2), all of float32 values.

    python benchmarks/extract.py [--layers 22] [--rank 32] [--rounds 3] [--mergekit VENV] [--folder DIR] [--no-matrix]
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loraformat.algebra.rank_rules import RankRule
from loraformat.algebra.row_blocks import leading
from loraformat.algebra.weights.difference import Difference, measure
from loraformat.model.tensors import LazyTensor

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 8, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 8, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TRUE_RANK, SIZE, NOISE = 64, 1e-2, 0.3


def main() -> None:
    """Both parts, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--mergekit", type=Path, help="a virtual environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where the pair is kept; a temporary folder by default")
    parser.add_argument("--no-matrix", action="store_true")
    options = parser.parse_args()
    if not options.no_matrix:
        one_matrix(options.rank, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        pair_of_models(Path(folder), options)


def one_matrix(rank: int, rounds: int, side: int = 4096) -> None:
    """Times of one difference, and how far each is above the least error."""
    g = np.random.default_rng(0)
    before = g.standard_normal((side, side), np.float32) * np.float32(0.02)
    change = g.standard_normal((side, TRUE_RANK)) @ g.standard_normal((TRUE_RANK, side))
    change += NOISE * np.sqrt(TRUE_RANK) * g.standard_normal((side, side))
    after = (before + change * (SIZE * 0.02 / np.sqrt(TRUE_RANK))).astype(np.float32)
    difference = Difference(LazyTensor.of(before), LazyTensor.of(after))
    delta = after.astype(np.float64) - before
    errors: dict[str, float] = {}

    def ours() -> None:
        _, source = measure(difference, 256 << 20)
        found = leading(source, RankRule(rank=rank), 3)
        errors["extract"] = found.tail(rank)

    def full() -> None:
        values = np.linalg.svd(delta.astype(np.float32), full_matrices=False)[1]
        errors["full SVD"] = float(np.sqrt((values[rank:].astype(np.float64) ** 2).sum()))

    def lowrank() -> None:
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(torch.from_numpy(delta.astype(np.float32)), q=rank, niter=2)
        errors["svd_lowrank"] = float(np.linalg.norm(delta - ((left * values) @ right.T).double().numpy()))

    torch.set_num_threads(1)
    tools: dict[str, Callable[[], None]] = {"extract": ours, "svd_lowrank": lowrank, "full SVD": full}
    times: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(rounds):
        for name, tool in tools.items():
            if name != "full SVD" or number == 0:
                start = time.perf_counter()
                tool()
                times[name].append(time.perf_counter() - start)
    best = {name: min(each) for name, each in times.items()}
    print(f"one difference of {side} x {side} to rank {rank}, one thread, the best of {rounds} (full SVD: 1)")
    for name, seconds in best.items():
        above = errors[name] / errors["full SVD"] - 1
        print(f"  {name:<12} {seconds:8.3f} s  {above:+9.4%} of the least error")
    print(f"  full SVD / extract = {best['full SVD'] / best['extract']:.1f}")


def pair_of_models(folder: Path, options: argparse.Namespace) -> None:
    """The tools on a pair of checkpoints."""
    base, tuned = make_pair(folder, options.layers)
    nbytes = sum(file.stat().st_size for file in base.iterdir())
    print(f"\n2 x {nbytes / 1e9:.2f} GB, {options.layers} layers, all linear, rank {options.rank}")
    ours = [sys.executable, "-m", "loraformat", "extract", str(base), str(tuned), "--rank", str(options.rank)]
    commands = {"extract": [*ours, "--jobs", str(options.jobs), "-o", "{out}"]}
    if options.mergekit is not None:
        tool = options.mergekit / "bin" / "mergekit-extract-lora"
        theirs = [str(tool), "--model", str(tuned), "--base-model", str(base), "--max-rank", str(options.rank)]
        commands["mergekit"] = [*theirs, "--out-path", "{out}"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(options.rounds):
        for name, command in commands.items():
            out = folder / f"{name}-{number}"
            found[name].append(run([part.format(out=out) for part in command]))
            if number:
                shutil.rmtree(out, ignore_errors=True)
    for name, runs in found.items():
        seconds, peak = min(each[0] for each in runs), max(each[1] for each in runs)
        out = folder / f"{name}-0"
        error, is_loaded = error_of(base, tuned, out), load(out, options.layers)
        print(f"  {name:<10} {seconds:8.1f} s  {peak:7.0f} MB  error {error:.5f}  PEFT: {is_loaded}")


def make_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    """A base and its fine-tuning, a shard for each layer."""
    generator = torch.Generator().manual_seed(0)
    paths = folder / "base", folder / "tuned"
    maps: list[dict[str, str]] = [{}, {}]
    for path in paths:
        path.mkdir()
    for layer in range(layers + 1):
        before: dict[str, torch.Tensor] = {}
        after: dict[str, torch.Tensor] = {}
        for name, shape in LINEAR.items() if layer < layers else []:
            weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            left, right = (torch.randn(size, TRUE_RANK, generator=generator) for size in shape)
            change = left @ right.T + NOISE * TRUE_RANK**0.5 * torch.randn(shape, generator=generator)
            key = f"model.layers.{layer}.{name}.weight"
            before[key] = weight
            after[key] = (weight.float() + change * (SIZE * 0.02 / TRUE_RANK**0.5)).bfloat16()
        norms = ["input_layernorm", "post_attention_layernorm"] if layer < layers else []
        same = {f"model.layers.{layer}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        if layer == layers:
            same["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                same[name] = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
        for path, tensors, weight_map in zip(paths, (before, after), maps, strict=True):
            file = f"model-{layer + 1:05}-of-{layers + 1:05}.safetensors"
            save_file({**tensors, **same}, path / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys([*tensors, *same], file))
    for path, weight_map in zip(paths, maps, strict=True):
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (path / "config.json").write_text(json.dumps(config(layers)))
    return paths


def config(layers: int) -> dict[str, Any]:
    """What transformers makes the model from."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def run(command: Sequence[str]) -> tuple[float, float]:
    """(wall seconds, MB at the peak) of a child process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, high_water_mark(child.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}: {said.read()[-2000:]}")
    return seconds, peak


def high_water_mark(pid: int) -> float:
    """The most resident memory that a process has had, in MB; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)


def error_of(base: Path, tuned: Path, adapter: Path) -> float:
    """‖Δ − s·BA‖ / ‖Δ‖ over the linear layers, from the files."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    apart = whole = 0.0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
        names = {name.removeprefix("base_model.model."): name for name in factors.keys()}  # noqa: SIM118 - it is not a dict
        for shard in sorted(base.glob("*.safetensors")):
            with safe_open(shard, "pt") as one, safe_open(tuned / shard.name, "pt") as other:
                for key in one.keys():  # noqa: SIM118
                    module = key.removesuffix(".weight")
                    if module.split(".", 3)[-1] not in LINEAR:
                        continue
                    delta = other.get_tensor(key).double() - one.get_tensor(key).double()
                    whole += float(delta.square().sum())
                    if f"{module}.lora_A.weight" in names:
                        a, b = (factors.get_tensor(names[f"{module}.lora_{side}.weight"]).double() for side in "AB")
                        rank = a.shape[0]
                        alpha = (settings.get("alpha_pattern") or {}).get(module, settings["lora_alpha"])
                        delta -= alpha / rank * b @ a
                    apart += float(delta.square().sum())
    return float((apart / whole) ** 0.5)


def load(adapter: Path, layers: int) -> str:
    """Whether PEFT loads a folder on the model, whose values do not matter."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config(layers)))
    try:
        PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "loads"


if __name__ == "__main__":
    main()
