"""A merge inside an object store against download, merge, upload: bytes, requests, seconds, in one alternating run.

Run: python benchmarks/remote.py [--rounds 3] [--megabytes 400]. The service is the strict server of the tests, on this
machine and these cores: bytes and requests are exact, seconds only say how much work there is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "s3"))

import boto3
import numpy as np
from s3_models import save
from s3_server import S3Server

MIB = 1 << 20
PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def make(folder: Path, megabytes: int) -> int:
    """A base of files of 100 MB in which one tensor of 8 MiB changes each; the changed bytes."""
    rng = np.random.default_rng(0)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    factors = {}
    count = max(1, megabytes // 100)
    for number in range(count):
        prefix = f"model.layers.{number}"
        shapes = {
            f"{prefix}.mlp.gate_proj.weight": (11264, 2048),
            f"{prefix}.self_attn.q_proj.weight": (2048, 2048),
            f"{prefix}.mlp.up_proj.weight": (11264, 2048),
        }
        values = {name: ("BF16", rng.integers(0, 1 << 14, shape, dtype=np.uint16)) for name, shape in shapes.items()}
        save(folder / "base" / f"model-{number + 1:05}-of-{count:05}.safetensors", values)
        for name, shape in (("A", (16, 2048)), ("B", (2048, 16))):
            key = f"base_model.model.{prefix}.self_attn.q_proj.lora_{name}.weight"
            factors[key] = ("F32", rng.standard_normal(shape).astype(np.float32) * np.float32(0.01))
    (folder / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    save(folder / "adapter" / "adapter_model.safetensors", factors)
    settings = '{"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}'
    (folder / "adapter" / "adapter_config.json").write_text(settings)
    return count * 8 * MIB


def in_the_store(out: str) -> str:
    """A program that merges there."""
    return f"import loraformat\nloraformat.merge('s3://models/base', ['s3://models/adapter'], '{out}', jobs=2)\n{PEAK}"


def by_download(out: str) -> str:
    """A program that downloads everything, merges on this machine, and uploads everything."""
    return (
        "import boto3, loraformat, os, pathlib\n"
        "s3, folder = boto3.client('s3'), pathlib.Path(os.environ['FOLDER'])\n"
        "for prefix in ('base', 'adapter'):\n"
        "    (folder / prefix).mkdir()\n"
        "    for one in s3.list_objects_v2(Bucket='models', Prefix=f'{prefix}/')['Contents']:\n"
        "        s3.download_file('models', one['Key'], str(folder / one['Key']))\n"
        "loraformat.merge(folder / 'base', [folder / 'adapter'], folder / 'out', jobs=2)\n"
        "for path in (folder / 'out').iterdir():\n"
        f"    s3.upload_file(str(path), 'models', '{out}/' + path.name)\n"
        f"{PEAK}"
    )


def measured(s3: S3Server, code: str, folder: Path) -> dict[str, float]:
    """What a program moves, and how long it takes."""
    since, begin = len(s3.log), time.perf_counter()
    env = {**os.environ, **s3.env(), "FOLDER": str(folder)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return {**s3.moved(since), "seconds": time.perf_counter() - begin, "peak": int(run.stdout.split()[-1]) / 1024}


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=400)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"in the store": [], "download, merge, upload": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        changed = make(folder, asked.megabytes)
        s3 = stack.enter_context(S3Server(str(folder / "server")))
        s3.put_folder("models", "base", str(folder / "base"))
        s3.put_folder("models", "adapter", str(folder / "adapter"))
        for number in range(asked.rounds):
            found["in the store"].append(measured(s3, in_the_store(f"s3://models/a{number}"), folder))
            with tempfile.TemporaryDirectory() as work:
                code = by_download(f"b{number}")
                found["download, merge, upload"].append(measured(s3, code, Path(work)))
    print(f"{boto3.__name__} {boto3.__version__}; {asked.megabytes} MB, of which {changed / MIB:.0f} MiB change")
    print(f"{'':26}{'MiB down':>10}{'MiB up':>10}{'MiB copied':>12}{'requests':>10}{'seconds':>9}{'peak MiB':>10}")
    for name, runs in found.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        sizes = "".join(f"{middle[key] / MIB:>{width}.1f}" for key, width in (("out", 10), ("in", 10), ("copied", 12)))
        print(f"{name:26}{sizes}{middle['requests']:>10.0f}{middle['seconds']:>9.1f}{middle['peak']:>10.0f}")


if __name__ == "__main__":
    main()
