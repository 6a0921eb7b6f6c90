"""How soon a merge ends after Ctrl-C, and whether it leaves anything behind.

Sends SIGINT to `loraformat merge` at times spread over a whole run on a base of some gigabytes, and waits. Prints how
long each run lived on: median and longest. A run that leaves anything but a whole output is a failure; one that ends
otherwise than with status 130 is named. Needs three times the size on disk.

    python benchmarks/interrupt.py [--gigabytes 2] [--points 20] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import apart, make_plain, ours, warm


def main() -> None:
    """Make, interrupt, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it, children too
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        apart(make_plain, folder, int(options.gigabytes * 1e9))
        warm(folder / "base")
        whole = run(folder, None)[0]
        shutil.rmtree(folder / "out")
        delays = [whole * (number + 1) / (options.points + 1) for number in range(options.points)]
        lived = [run(folder, delay) for delay in delays]
        failures = [(delay, status) for delay, (_, status) in zip(delays, lived, strict=True) if status != 130]
        times = [seconds for seconds, status in lived if status == 130]
        print(
            f"a whole run takes {whole:.1f} s; interrupted at {len(delays)} points, {len(times)} ended with status 130"
        )
        print(f"after the signal: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")
        for delay, status in failures:
            print(f"at {delay:.2f} s: status {status}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, delay: float | None) -> tuple[float, int]:
    """Seconds from the signal, or from the start without one, to the end; exit status."""
    kept = set(os.listdir(folder))
    child = subprocess.Popen(ours(folder, "all-linear-16"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.perf_counter()
    if delay is not None:
        try:
            child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            start = time.perf_counter()
            child.send_signal(signal.SIGINT)
    status = child.wait()
    seconds = time.perf_counter() - start
    left = set(os.listdir(folder)) - kept
    if "out" in left:
        subprocess.run([sys.executable, "-m", "loraformat", "verify", str(folder / "out")], check=True)
    if left - {"out"}:
        raise SystemExit(f"left behind: {sorted(left)}")
    if delay is not None:
        shutil.rmtree(folder / "out", ignore_errors=True)
    return seconds, status


if __name__ == "__main__":
    main()
