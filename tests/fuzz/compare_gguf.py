"""Our GGUF reader beside the gguf package's, on damaged files: what both read must be the same.

Where only ours refuses, its message says which rule of llama.cpp's reader or of this one the other lacks; where only
the other refuses, that is a difference. Run: python tests/fuzz/compare_gguf.py [--seconds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402 - after the path of the files beside this one
from fuzz_targets import gguf_seeds  # noqa: E402
from gguf import GGUFReader, GGUFValueType  # noqa: E402
from run import mutated  # noqa: E402

from loraformat.containers.gguf.header import Array, Header, read_header  # noqa: E402
from loraformat.errors import LoraFormatError  # noqa: E402
from loraformat.storage import MemoryStore  # noqa: E402

_MOST_SECONDS = 0.3


def ours(data: bytes) -> Header | str:
    """What is read, or the rule that is broken, without numbers and names."""
    try:
        return read_header(MemoryStore({"x.gguf": data}), "x.gguf")
    except LoraFormatError as error:
        return f"{type(error).__name__}: " + re.sub(r'"[^"]*"|\S*\d\S*', "_", error.message)[:60]


def theirs(path: Path, data: bytes) -> GGUFReader | None:
    """What the package reads; it raises whatever numpy does where a file is damaged, and may go on for ever."""
    path.write_bytes(data)
    try:
        signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return GGUFReader(path)
    except Exception:  # noqa: BLE001 - any of them is a refusal
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(*_: object) -> None:
    raise TimeoutError


def difference(header: Header, reader: GGUFReader) -> str:
    """The first thing that the two read differently, or ""."""
    listed = [(one.name, int(one.tensor_type), one.shape.tolist(), int(one.data_offset)) for one in reader.tensors]
    found = [(name, one.type.code, [*reversed(one.shape)], one.span.offset) for name, one in header.tensors.items()]
    if listed != found:
        return f"tensors: {found[:3]} and {listed[:3]}"
    fields = {key: one for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    if fields.keys() != header.fields.keys():
        return f"keys: {sorted(fields.keys() ^ header.fields.keys())[:3]}"
    for key, field in fields.items():
        if not _is_same(header.fields[key].value, field):
            return f"{key}: {header.fields[key].value}"
    return ""


def _is_same(value: Any, field: Any) -> bool:
    if isinstance(value, Array):
        kind = field.types[1].name if len(field.types) > 1 else None
        if value.items is None or not value.count:
            return len(field.data) == value.count
        items = field.contents()
        return kind == value.type and all(_equal(one, other) for one, other in zip(value.items, items, strict=True))
    return field.types[0] in GGUFValueType and _equal(value, field.contents())


def _equal(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, pool, counts = random.Random(options.seed), gguf_seeds(), Counter[str]()
    signal.signal(signal.SIGALRM, _interrupt)
    faults = 0
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        while time.monotonic() < end:
            data = mutated(chance.choice(pool), pool, chance)
            header, reader = ours(data), theirs(path, data)
            counts["executions"] += 1
            if isinstance(header, str):
                counts["refused by both" if reader is None else f"refused here alone: {header}"] += 1
                continue
            counts["read by both" if reader is not None else "DIFFERENCE: read here alone"] += 1
            fault = "only read here" if reader is None else difference(header, reader)
            if fault:
                faults += 1
                print(f"DIFFERENCE: {fault}: {data[:64].hex()}", flush=True)
    for what, count in counts.most_common():
        print(f"{count:8} {what}")
    print(f"{counts['executions']} executions, {faults} differences")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
