"""`loraformat merge` of a GGUF base against a durable copy of it: F16, and Q8_0 with the codes of what stays.

For each base, with a warm page cache and in alternating runs: `cp` followed by `sync -f`, and `loraformat merge` of an
adapter for every linear layer, and for attention alone. Prints medians of wall time and peak memory. Needs the gguf
package, and three times the size on disk.

    python benchmarks/merge_gguf.py [--gigabytes 2] [--runs 3] [--kinds F16,Q8_0] [--folder DIR]
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from merge import Run, apart, copy, spawn, warm
from merge_memory import HIDDEN, INTERMEDIATE, LINEAR, VOCABULARY, make_adapter

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NBYTES = {"F16": 2.0, "Q8_0": 34 / 32}
_HEADS = 32


def make(folder: Path, kind: str, nbytes: int) -> None:
    """Write `base/model.gguf` and two adapters."""
    import gguf
    import numpy as np

    chance = np.random.default_rng(0)
    of_layer = _NBYTES[kind] * sum(rows * cols for rows, cols in LINEAR.values())
    layers = max(1, round((nbytes - 2 * _NBYTES[kind] * VOCABULARY * HIDDEN) / of_layer))
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{_NAMES[name]}.weight": shape for name, shape in LINEAR.items()}
    (folder / "base").mkdir()
    writer = gguf.GGUFWriter(folder / "base" / "model.gguf", "llama", use_temp_file=True)
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS // 4)
    for name, (rows, cols) in shapes.items():
        if kind == "F16":
            writer.add_tensor(name, (chance.standard_normal((rows, cols), np.float32) * 0.02).astype(np.float16))
            continue
        blocks = chance.integers(0, 256, (rows, cols // 32, 34), dtype=np.uint8)
        scales = chance.uniform(1e-4, 4e-4, (rows, cols // 32)).astype(np.float16)
        blocks[:, :, :2] = scales[..., None].view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make_adapter(folder / "all-linear", layers, 16)
    make_attention(folder)


def make_attention(folder: Path) -> None:
    """The part of the adapter that changes attention."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "all-linear" / "adapter_model.safetensors")
    (folder / "attention").mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if ".self_attn." in name}
    save_file(kept, folder / "attention" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "all-linear" / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (folder / "attention" / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(_NBYTES), help="of bases, with commas")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    print("base  adapter     options            cp s  merge s  /cp  peak MB  written GB", flush=True)
    for kind in options.kinds.split(","):
        folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
        try:
            apart(make, folder, kind, int(options.gigabytes * 1e9))
            for adapter in ("all-linear", "attention"):
                compare(folder, kind, adapter, options.runs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, kind: str, adapter: str, runs: int) -> None:
    """One line of the table."""
    more = [] if kind == "F16" else ["--keep-quantized"]
    base, out = folder / "base" / "model.gguf", folder / "out"
    merge = [sys.executable, "-m", "loraformat", "merge", str(base), str(folder / adapter), "-o", str(out), *more]
    found: dict[str, list[Run]] = {"cp": [], "merge": []}
    for _ in range(runs):
        for tool, command in (("cp", copy(folder)), ("merge", merge)):
            warm(folder / "base")
            found[tool].append(spawn(command, folder))
    copied, merged = (statistics.median(run.wall for run in found[tool]) for tool in ("cp", "merge"))
    peak = max(run.peak for run in found["merge"]) / 1e6
    written = found["merge"][0].written / 1e9
    option = " ".join(more) or "-"
    figures = f"{copied:5.2f}  {merged:7.2f}  {merged / copied:3.2f}  {peak:7.0f}  {written:10.2f}"
    print(f"{kind:<5} {adapter:<11} {option:<17} {figures}", flush=True)


if __name__ == "__main__":
    main()
