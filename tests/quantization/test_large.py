"""A base of many gigabytes is planned from its headers: files of holes, which take no room on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import safetensors

LAYERS, EXPERTS = 4, 32
# Prints the report's count of decoded weights and the peak of its own memory in KiB.
PLANNED = """
import resource, sys
import loraformat
report = loraformat.dequantize(sys.argv[1], sys.argv[1] + "-out", dry_run=True)
print(report.data.tensors_dequantized, report.data.bytes_written, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def sparse(folder: Path, size: int) -> Path:
    """FP8 in blocks of 128: layers of stacked names, each weight of size x size."""
    folder.mkdir()
    grid, weight_map = -(-size // 128), {}
    for layer in range(LAYERS):
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        entries: dict[str, tuple[str, list[int], int]] = {}
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            entries[name] = ("F8_E4M3", [size, size], size * size)
            entries[f"{name}_scale_inv"] = ("F32", [grid, grid], 4 * grid * grid)
        weight_map |= dict.fromkeys(entries, file)
        head = safetensors(entries, b"")
        (folder / file).write_bytes(head)
        os.truncate(folder / file, len(head) + sum(nbytes for _, _, nbytes in entries.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(folder: Path) -> tuple[int, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, str(folder)], check=True, capture_output=True, text=True, timeout=60
    )
    decoded, nbytes, peak = map(int, done.stdout.split())
    return decoded, nbytes, peak


@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss is in bytes there, and APFS reserves room for holes")
def test_memory_of_a_plan_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    small, large = planned(sparse(tmp_path / "s", 128)), planned(sparse(tmp_path / "l", 16384))
    count = LAYERS * EXPERTS
    assert small[:2] == (count, count * 128 * 128 * 2)
    assert large[:2] == (count, count * 16384 * 16384 * 2)
    assert os.stat(tmp_path / "l" / "model-00001-of-00004.safetensors").st_size > 8 << 30
    assert large[2] < small[2] + (8 << 10), "KiB"
    assert not (tmp_path / "l-out").exists()
