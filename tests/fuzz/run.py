"""Fuzzes one target, or all of them, for some seconds; what is found is written to tests/fuzz/found/TARGET/.

Run: python tests/fuzz/run.py [--seconds 60] [--seed 0] [TARGET ...]
With atheris, guided by coverage: python tests/fuzz/run.py --atheris TARGET [-max_total_time=60]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from fuzz_targets import TARGETS, TOKENS, call, seeds  # noqa: E402 - beside this file

FOUND = Path(__file__).parent / "found"
MOST_BYTES = 1 << 16


def mutated(data: bytes, pool: list[bytes], chance: random.Random) -> bytes:
    """The bytes with one to eight changes: flips, numbers, tokens, cuts, copies, and joins with another input."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(out) + 1)
        change = chance.randrange(8)
        if change == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << chance.randrange(8)
        elif change == 1 and out:
            out[min(at, len(out) - 1)] = chance.randrange(256)
        elif change == 2:
            out[at:at] = chance.choice(TOKENS)
        elif change == 3:
            out[at : at + chance.randint(1, 16)] = chance.choice(TOKENS)
        elif change == 4:
            del out[at : at + chance.randint(1, 1 + len(out) // 4)]
        elif change == 5:
            start = chance.randrange(len(out) + 1)
            out[at:at] = out[start : start + chance.randint(1, 64)]
        elif change == 6:
            out[at : at + 8] = chance.choice((0, 1, 255, 2**31, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        else:
            other = chance.choice(pool)
            start = chance.randrange(len(other) + 1)
            out[at:] = other[start:]
    return bytes(out[:MOST_BYTES])


def keep(name: str, data: bytes) -> Path:
    folder = FOUND / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def fuzz(name: str, seconds: float, seed: int) -> tuple[int, int]:
    """Executions, and different faults."""
    chance = random.Random(f"{name}{seed}")
    pool = seeds(name)
    faults: set[str] = set()
    executions = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(chance.choice(pool), pool, chance)
        started = time.monotonic()
        executions += 1
        try:
            call(name, data)
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} {place.filename}:{place.lineno}"
            if key not in faults:
                faults.add(key)
                print(f"{name}: {key}: {str(error)[:200]} -> {keep(name, data)}", flush=True)
        if time.monotonic() - started > 5:
            print(f"{name}: slow -> {keep(name, data)}", flush=True)
            faults.add("slow")
        if len(pool) < 2000 and chance.random() < 0.02:
            pool.append(data)
    return executions, len(faults)


def with_atheris(name: str, arguments: list[str]) -> None:
    import atheris

    folder = Path("/tmp") / f"loraformat-corpus-{name}"
    folder.mkdir(exist_ok=True)
    for data in seeds(name):
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *arguments, str(folder)], lambda data: call(name, data))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", metavar="TARGET")
    options, more = parser.parse_known_args()
    if options.atheris:
        with_atheris(options.atheris, more)
        return 0
    unknown = sorted({*options.targets} - TARGETS.keys())
    if unknown:
        parser.error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    worst = 0
    for name in options.targets or TARGETS:
        executions, faults = fuzz(name, options.seconds, options.seed)
        print(f"{name}: {executions} executions, {faults} faults", flush=True)
        worst = max(worst, faults)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
