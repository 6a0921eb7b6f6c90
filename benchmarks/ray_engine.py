"""`loraformat merge --engine ray` on one node against threads of one process and against ranks, in alternating runs.

Makes a Llama-shaped bfloat16 base in files of 256 MB and a PEFT adapter on every linear layer, merges with threads,
with workers of a Ray cluster that is started once before, and as ranks with `--finish`, and compares all outputs.
Prints medians of wall time; what starting the cluster took; and how many seconds a task of Ray costs beside its work.

    python benchmarks/ray_engine.py [--gigabytes 1] [--runs 3] [--workers 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from merge_memory import make_adapter, make_base


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """A merge of the base and the adapter in a folder."""
    words = ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(out), "--format", "json", *more]
    return [sys.executable, "-m", "loraformat", *words]


def run(*words: str) -> None:
    """A command that succeeds."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def by_ranks(folder: Path, out: Path, workers: int) -> None:
    """All ranks at once, then the end."""
    start = command(folder, out, "--jobs", "1", "--world", str(workers))
    running = [subprocess.Popen([*start, "--rank", str(n)], stdout=subprocess.DEVNULL) for n in range(workers)]
    assert [process.wait() for process in running] == [0] * workers
    run(*command(folder, out, "--finish"))


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="ray-") as name:
        folder = Path(name)
        layers = make_base(folder / "base", int(asked.gigabytes * 1e9))
        make_adapter(folder / "adapter", layers, 16)
        files = len(list((folder / "base").glob("*.safetensors")))
        begin = time.perf_counter()
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": asked.workers, "object_store_memory": 80 << 20, "include_dashboard": False},
        )
        started = time.perf_counter() - begin
        ray.init(address=cluster.address, log_to_driver=False)
        call = ray.remote(lambda: None)
        ray.get([call.remote() for _ in range(asked.workers)])
        begin = time.perf_counter()
        for _ in range(100):
            ray.get(call.remote())
        each = (time.perf_counter() - begin) / 100
        ray.shutdown()
        ways: dict[str, Callable[[Path], None]] = {
            "threads": lambda out: run(*command(folder, out, "--jobs", str(asked.workers))),
            "ray": lambda out: run(*command(folder, out, "--jobs", "1", "--engine", f"ray={cluster.address}")),
            "ranks": lambda out: by_ranks(folder, out, asked.workers),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        wanted: dict[str, str] = {}
        for number in range(asked.runs):
            for way, merge in ways.items():
                begin = time.perf_counter()
                merge(folder / "out")
                times[way].append(time.perf_counter() - begin)
                found = digests(folder / "out")
                wanted = wanted or found
                assert found == wanted, way
                shutil.rmtree(folder / "out")
                print(f"run {number} {way}: {times[way][-1]:.1f} s, equal bytes", flush=True)
        cluster.shutdown()
        print(f"{asked.gigabytes:g} GB in {files} files, {asked.workers} workers, medians of {asked.runs} runs")
        for way, values in times.items():
            print(f"{way:8} {statistics.median(values):6.1f} s ({min(values):.1f} to {max(values):.1f})")
        print(f"start of the cluster {started:.1f} s; a task that does nothing {1000 * each:.1f} ms")


if __name__ == "__main__":
    main()
