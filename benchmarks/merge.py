"""`loraformat merge` against `cp` and against PEFT, on a Llama checkpoint that transformers saved.

For each adapter and for a warm and a cold page cache, in alternating runs: `cp -r` followed by `sync -f`, `loraformat
merge`, and PEFT's load, merge and save. Prints medians of wall time, processor time, peak memory and bytes moved; then
what --hash and --verify cost, where the time goes, and wall time and peak memory against the size of the
base; at the end all tables once more. Needs three times the largest size on disk.

    python benchmarks/merge.py [--gigabytes 2] [--runs 3] [--sizes 1,2,4,8] [--no-peft] [--folder DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merge_memory import HIDDEN, INTERMEDIATE, LINEAR, QUIET, VOCABULARY, make_base

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""
SHARES = """
import functools, os, sys, time
from loraformat.jobs.merge import merge
from loraformat.merger.compute import computer
from loraformat.merger.write import tasks
from loraformat.merger.write import digests
from loraformat.storage import new_hash
from loraformat.storage.local.store import LocalStore, LocalWriter
spent = {}
def timed(key, real):
    @functools.wraps(real)
    def call(*args, **kwargs):
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return real(*args, **kwargs)
        finally:
            before = spent.get(key, (0, 0))
            spent[key] = (before[0] + time.perf_counter() - wall, before[1] + time.thread_time() - cpu)
    return call
class Hash:
    def __init__(self):
        self._real = new_hash()
        self.update, self.hexdigest = timed("hash", self._real.update), self._real.hexdigest
digests.new_hash = tasks.new_hash = Hash
LocalStore.read_into = timed("read", LocalStore.read_into)
LocalWriter.write_at = timed("write", LocalWriter.write_at)
computer.Computer._computed = timed("arithmetic", computer.Computer._computed)
os.fsync = timed("sync", os.fsync)
start, before = time.perf_counter(), time.process_time()
merge(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=2, verify="none")
wall, cpu = time.perf_counter() - start, time.process_time() - before
print(f"  {wall:.2f} s in all, {cpu:.2f} s of processor time; summed over the threads:")
for key, (waited, worked) in sorted(spent.items()):
    print(f"  {key:<28} {waited:5.2f} s, of that processor {worked:5.2f} s ({worked / cpu:.0%})")
"""


TABLES: list[str] = []


@dataclass(frozen=True, slots=True)
class Run:
    """One child: wall and processor seconds, peak resident bytes, bytes asked for by read and write calls."""

    wall: float
    cpu: float
    peak: int
    read: int
    written: int


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", default="", help="gigabytes, with commas: peak memory against size")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with_peft = not options.no_peft and importlib.util.find_spec("peft") is not None
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        apart(make, folder, int(options.gigabytes * 1e9))
        compare(folder, options.runs, with_peft=with_peft)
        cost_of_options(folder, options.runs)
        print("\nwhere the time goes (all-linear, rank 16, warm):", flush=True)
        warm(folder / "base")
        spawn([sys.executable, "-c", SHARES, *paths(folder, "all-linear-16")], folder, quiet=False)
        shutil.rmtree(folder / "base")
        if options.sizes:
            columns = "wall s  cpu s  peak MB  read GB  written GB  /cp  /cp without start-up"
            tell(f"\nsize (all-linear, rank 16)         {columns}")
        for size in filter(None, options.sizes.split(",")):
            memory(folder, float(size))
        print("\nall tables\n" + "\n".join(TABLES), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(line: str) -> None:
    """Print a line of a table, and keep it for the end."""
    TABLES.append(line)
    print(line, flush=True)


def start_up(folder: Path, runs: int) -> float:
    """Seconds until Python has what a merge of plain LoRA imports."""
    command = [sys.executable, "-c", "import numpy, loraformat.cli, loraformat.rules, loraformat.jobs.merge"]
    return statistics.median(spawn(command, folder).wall for _ in range(runs))


def compare(folder: Path, runs: int, *, with_peft: bool) -> None:
    """The table of wall times."""
    lead = start_up(folder, runs)
    tell(f"start-up of Python and loraformat: {lead:.2f} s, contained in every time of loraformat below")
    tell("cache  adapter        tool         wall s  cpu s  peak MB  read GB  written GB  /cp  /cp without start-up")
    for cache in ("warm", "cold"):
        ranks = (16, 64) if cache == "warm" else (16,)
        adapters = [f"{kind}-{rank}" for kind in ("all-linear", "attention") for rank in ranks]
        for adapter in (*adapters, *(("dora-16", "tables-16") if cache == "warm" else ())):
            tools = {"cp": copy(folder), "loraformat": ours(folder, adapter)}
            if with_peft and (cache, adapter) == ("warm", "all-linear-16"):
                tools["peft"] = [sys.executable, "-c", PEFT_MERGE, *paths(folder, adapter)]
            found: dict[str, list[Run]] = {tool: [] for tool in tools}
            for _ in range(runs):
                for tool, command in tools.items():
                    (warm if cache == "warm" else cold)(folder / "base")
                    found[tool].append(spawn(command, folder))
            copied = statistics.median(run.wall for run in found["cp"])
            written = sum(path.stat().st_size for path in (folder / "base").iterdir())
            tell(f"cp writes {written / copied / 1e9:.2f} GB/s")
            for tool, those in found.items():
                say(f"{cache}   {adapter:<13}  {tool:<11}", those, copied, lead if tool == "loraformat" else 0.0)


def cost_of_options(folder: Path, runs: int) -> None:
    """What checks and hashes cost, against a merge without them."""
    tell("\noption (all-linear, warm)          wall s  cpu s  peak MB  read GB  written GB  /none")
    variants = {"--verify none": ("--verify", "none")}
    variants |= {"--verify sample": (), "--verify full": ("--verify", "full")}
    variants |= {"--verify none --no-hash": ("--verify", "none", "--no-hash")}
    variants |= {"--verify none --hash sha256": ("--verify", "none", "--hash", "sha256")}
    for rank in (16, 64):
        if rank == 64:
            variants = {name: more for name, more in variants.items() if "hash" not in name and "none" in name}
        found: dict[str, list[Run]] = {name: [] for name in variants}
        for _ in range(runs):
            for name, more in variants.items():
                warm(folder / "base")
                found[name].append(spawn(ours(folder, f"all-linear-{rank}", *more), folder))
        plain = statistics.median(run.wall for run in found["--verify none"])
        for name, those in found.items():
            say(f"rank {rank}  {name:<37}", those, plain, 0.0)


def memory(folder: Path, gigabytes: float) -> None:
    """Wall time and peak memory of a merge into a base of one size."""
    for name in ("base", "all-linear-16"):
        shutil.rmtree(folder / name, ignore_errors=True)
    apart(make_plain, folder, int(gigabytes * 1e9))
    warm(folder / "base")
    copied = spawn(copy(folder), folder).wall
    warm(folder / "base")
    say(f"{gigabytes:5g} GB{'':25}", [spawn(ours(folder, "all-linear-16"), folder)], copied, start_up(folder, 1))


def say(label: str, runs: list[Run], against: float, lead: float) -> None:
    """A line of medians."""
    wall, cpu, peak, read, written = (
        statistics.median(getattr(run, name) for run in runs) for name in ("wall", "cpu", "peak", "read", "written")
    )
    line = f"{label} {wall:7.2f} {cpu:6.2f} {peak / 1e6:8.0f} {read / 1e9:8.2f} {written / 1e9:11.2f}"
    tell(f"{line} {wall / against:5.2f}" + (f" {(wall - lead) / against:8.2f}" if lead else ""))


def paths(folder: Path, adapter: str) -> list[str]:
    """Base, adapter, output."""
    return [str(folder / name) for name in ("base", adapter, "out")]


def ours(folder: Path, adapter: str, *more: str) -> list[str]:
    """The command of a merge."""
    base, change, out = paths(folder, adapter)
    return [sys.executable, "-m", "loraformat", "merge", base, change, "-o", out, *more]


def copy(folder: Path) -> list[str]:
    """The command of a copy that is on the disk when it ends."""
    return ["/bin/sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(folder / "base"), str(folder / "out")]


def spawn(command: list[str], folder: Path, *, quiet: bool = True) -> Run:
    """Run a child to its end and remove what it wrote."""
    os.sync()
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip installs byte code too: no user compiles at each start
    child = os.posix_spawnp(command[0], command, environment, file_actions=QUIET if quiet else [])
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    wall = time.perf_counter() - start
    moved = dict(line.split(": ") for line in Path(f"/proc/{child}/io").read_text().splitlines())
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{command} failed with status {status}")
    shutil.rmtree(folder / "out", ignore_errors=True)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss * 1024, int(moved["rchar"]), int(moved["wchar"]))


def warm(folder: Path) -> None:
    """Read every file of a folder into the page cache."""
    buffer = bytearray(1 << 22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cold(folder: Path) -> None:
    """Drop every file of a folder from the page cache."""
    os.sync()
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a process of its own: a child starts with the peak of its parent, which must stay small."""
    maker = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the inputs could not be made")


def make(folder: Path, nbytes: int) -> None:
    """A Llama with random weights as transformers saves it, and PEFT adapters for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = layers_for(nbytes)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)
    for rank in (16, 64):
        make_adapter(folder / f"all-linear-{rank}", layers, rank, tuple(LINEAR))
        make_adapter(folder / f"attention-{rank}", layers, rank, tuple(name for name in LINEAR if "attn" in name))
    make_adapter(folder / "dora-16", layers, 16, tuple(LINEAR), is_dora=True)
    make_adapter(folder / "tables-16", layers, 16, tuple(LINEAR), has_tables=True)
    size = sum(path.stat().st_size for path in (folder / "base").iterdir())
    print(f"base {size / 1e9:.2f} GB, {layers} layers, bfloat16; {os.cpu_count()} processors", flush=True)


def make_plain(folder: Path, nbytes: int) -> None:
    """A base of another size, shard by shard, and an adapter for it."""
    make_adapter(folder / "all-linear-16", make_base(folder / "base", nbytes), 16, tuple(LINEAR))


def layers_for(nbytes: int) -> int:
    """How many layers make a base of about `nbytes`."""
    layer_nbytes = 2 * sum(rows * cols for rows, cols in LINEAR.values())
    return max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / layer_nbytes))


def make_adapter(
    folder: Path, layers: int, rank: int, modules: tuple[str, ...], *, is_dora: bool = False, has_tables: bool = False
) -> None:
    """A PEFT adapter for some of the linear layers; as DoRA, or with both tables of the vocabulary saved whole."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name in modules:
            rows, cols = LINEAR[name]
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, cols, generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
            if is_dora:
                tensors[f"{module}.lora_magnitude_vector"] = torch.rand(rows, generator=generator) + 0.5
    for table in ("model.embed_tokens", "lm_head") if has_tables else ():
        values = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.02
        tensors[f"base_model.model.{table}.weight"] = values.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in modules)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    config |= {"base_model_name_or_path": "example/base", "task_type": "CAUSAL_LM", "use_dora": is_dora}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"]} if has_tables else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
