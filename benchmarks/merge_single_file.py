"""`loraformat merge` into a single-file checkpoint of Stable Diffusion XL, against a copy that is on the disk.

Makes a float16 checkpoint with the real names and shapes (U-Net, both text encoders, 167 MB in the place of the VAE,
of random values), and a file of kohya's scripts with rank 16 for every linear layer of attention and MLP in the U-Net
and in both encoders. Then, in alternating runs with a warm page cache: `cp` and `sync -f`, and the merge. Prints
medians of wall time, processor time and peak resident memory. Needs twice the size on disk.

    python benchmarks/merge_single_file.py [--channels 320] [--runs 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from merge import apart, ours, spawn, warm

RANK, ALPHA = 16, 8.0
Shapes = dict[str, tuple[int, ...]]
# Levels of the U-Net: times the channels, transformer blocks in each attention. Source: Stability AI, sd_xl_base.yaml.
LEVELS = ((1, 0), (2, 2), (4, 10))


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=320, help="of the U-Net; 320 is SDXL, a multiple of 32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loraformat-bench-", dir=options.folder))
    try:
        apart(make, folder, options.channels)
        command = ["/bin/sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(folder / "base"), str(folder / "out")]
        tools = {"cp": command, "loraformat": ours(folder, "style", "--jobs", "2")}
        tools["loraformat"][4:6] = [
            str(folder / "base" / "sdxl.safetensors"),
            str(folder / "style" / "style.safetensors"),
        ]
        found: dict[str, list[tuple[float, float, int]]] = {tool: [] for tool in tools}
        for _ in range(options.runs):
            for tool, arguments in tools.items():
                warm(folder / "base")
                run = spawn(arguments, folder)
                found[tool].append((run.wall, run.cpu, run.peak))
        print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")
        print("tool         wall s   cpu s  peak MB")
        for tool, runs in found.items():
            wall, cpu, peak = (statistics.median(each) for each in zip(*runs, strict=True))
            print(f"{tool:<11} {wall:7.2f} {cpu:7.2f} {peak / 1e6:8.0f}")
        ratio = statistics.median(b[0] / a[0] for a, b in zip(found["cp"], found["loraformat"], strict=True))
        print(f"merge / cp, run by run: median {ratio:.2f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def linear(shapes: Shapes, name: str, rows: int, cols: int) -> None:
    """A weight and a bias."""
    shapes |= {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def resnet(shapes: Shapes, name: str, inputs: int, outputs: int, times: int) -> None:
    """Two convolutions, the projection of the time, and a shortcut where the sizes differ."""
    shapes |= {f"{name}.in_layers.0.weight": (inputs,), f"{name}.out_layers.0.weight": (outputs,)}
    shapes |= {f"{name}.in_layers.2.weight": (outputs, inputs, 3, 3), f"{name}.in_layers.2.bias": (outputs,)}
    shapes |= {f"{name}.out_layers.3.weight": (outputs, outputs, 3, 3), f"{name}.out_layers.3.bias": (outputs,)}
    linear(shapes, f"{name}.emb_layers.1", outputs, times)
    if inputs != outputs:
        shapes[f"{name}.skip_connection.weight"] = (outputs, inputs, 1, 1)


def attention(shapes: Shapes, name: str, size: int, depth: int, context: int) -> None:
    """A stack of transformer blocks."""
    linear(shapes, f"{name}.proj_in", size, size)
    linear(shapes, f"{name}.proj_out", size, size)
    for block in (f"{name}.transformer_blocks.{number}" for number in range(depth)):
        for attn, width in (("attn1", size), ("attn2", context)):
            shapes |= {f"{block}.{attn}.{leaf}.weight": (size, width) for leaf in ("to_k", "to_v")}
            shapes[f"{block}.{attn}.to_q.weight"] = (size, size)
            linear(shapes, f"{block}.{attn}.to_out.0", size, size)
        linear(shapes, f"{block}.ff.net.0.proj", 8 * size, size)
        linear(shapes, f"{block}.ff.net.2", size, 4 * size)


def unet(channels: int) -> Shapes:
    """The U-Net by the names of its authors."""
    shapes: Shapes = {}
    times, context = 4 * channels, 32 * channels // 5
    linear(shapes, "time_embed.0", times, channels)
    linear(shapes, "time_embed.2", times, times)
    linear(shapes, "label_emb.0.0", times, 44 * channels // 5)
    linear(shapes, "label_emb.0.2", times, times)
    shapes["input_blocks.0.0.weight"] = (channels, 4, 3, 3)
    size, number, skips = channels, 1, [channels]
    for level, (factor, depth) in enumerate(LEVELS):
        for _ in range(2):
            resnet(shapes, f"input_blocks.{number}.0", size, factor * channels, times)
            size = factor * channels
            if depth:
                attention(shapes, f"input_blocks.{number}.1", size, depth, context)
            skips.append(size)
            number += 1
        if level < len(LEVELS) - 1:
            shapes[f"input_blocks.{number}.0.op.weight"] = (size, size, 3, 3)
            skips.append(size)
            number += 1
    for place in (0, 2):
        resnet(shapes, f"middle_block.{place}", size, size, times)
    attention(shapes, "middle_block.1", size, LEVELS[-1][1], context)
    number = 0
    for factor, depth in reversed(LEVELS):
        for place in range(3):
            resnet(shapes, f"output_blocks.{number}.0", size + skips.pop(), factor * channels, times)
            size = factor * channels
            if depth:
                attention(shapes, f"output_blocks.{number}.1", size, depth, context)
            if place == 2 and factor > 1:
                shapes[f"output_blocks.{number}.2.conv.weight"] = (size, size, 3, 3)
            number += 1
    shapes["out.2.weight"] = (4, size, 3, 3)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


def encoders(channels: int) -> Shapes:
    """CLIP by OpenAI with 12 layers, and OpenCLIP's with 32, which joins query, key and value."""
    shapes: Shapes = {}
    small, large, words = 12 * channels // 5, 4 * channels, 49408 * channels // 320
    head = "conditioner.embedders.0.transformer.text_model"
    shapes[f"{head}.embeddings.token_embedding.weight"] = (words, small)
    for layer in (f"{head}.encoder.layers.{number}" for number in range(12)):
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(shapes, f"{layer}.self_attn.{leaf}", small, small)
        linear(shapes, f"{layer}.mlp.fc1", 4 * small, small)
        linear(shapes, f"{layer}.mlp.fc2", small, 4 * small)
    head = "conditioner.embedders.1.model"
    shapes |= {f"{head}.token_embedding.weight": (words, large), f"{head}.text_projection": (large, large)}
    for layer in (f"{head}.transformer.resblocks.{number}" for number in range(32)):
        shapes |= {f"{layer}.attn.in_proj_weight": (3 * large, large), f"{layer}.attn.in_proj_bias": (3 * large,)}
        linear(shapes, f"{layer}.attn.out_proj", large, large)
        linear(shapes, f"{layer}.mlp.c_fc", 4 * large, large)
        linear(shapes, f"{layer}.mlp.c_proj", large, 4 * large)
    return shapes


def adapted(shapes: Shapes) -> Iterator[tuple[str, int, int]]:
    """(kohya's name of a module, rows, columns) of all linear layers of attention and MLP."""
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name.startswith("model.diffusion_model.") and ".transformer_blocks." in name and len(shape) == 2:
            yield f"lora_unet_{module.removeprefix('model.diffusion_model.').replace('.', '_')}", *shape
        elif ".encoder.layers." in name and len(shape) == 2:
            yield f"lora_te1_{module.partition('transformer.')[2].replace('.', '_')}", *shape
        elif ".resblocks." in name and len(shape) == 2:
            number, leaf = module.split(".resblocks.")[1].split(".", 1)
            layer = f"lora_te2_text_model_encoder_layers_{number}"
            if name.endswith("in_proj_weight"):
                yield from ((f"{layer}_self_attn_{part}_proj", shape[0] // 3, shape[1]) for part in "qkv")
            else:
                leaves = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}
                yield f"{layer}_{leaves[leaf]}", *shape


def make(folder: Path, channels: int) -> None:
    """The checkpoint and the adapter."""
    import numpy as np
    from safetensors.numpy import save_file

    shapes = unet(channels) | encoders(channels)
    vae = 512 * channels // 320
    shapes |= {f"first_stage_model.decoder.block.{number}.conv.weight": (vae, vae, 3, 3) for number in range(35)}
    random = np.random.default_rng(0)
    (folder / "base").mkdir()
    write(folder / "base" / "sdxl.safetensors", shapes, (random.standard_normal(1 << 24) * 0.02).astype(np.float16))
    tensors = {}
    for module, rows, cols in adapted(shapes):
        tensors[f"{module}.lora_down.weight"] = (random.standard_normal((RANK, cols)) * 0.02).astype(np.float16)
        tensors[f"{module}.lora_up.weight"] = (random.standard_normal((rows, RANK)) * 0.02).astype(np.float16)
        tensors[f"{module}.alpha"] = np.array(ALPHA, np.float16)
    (folder / "style").mkdir()
    save_file(tensors, folder / "style" / "style.safetensors")
    size = (folder / "base" / "sdxl.safetensors").stat().st_size
    own = (folder / "style" / "style.safetensors").stat().st_size
    print(f"checkpoint {size / 1e9:.2f} GB, {len(shapes)} tensors; adapter {own / 1e6:.0f} MB", flush=True)
    print(f"{len(tensors) // 3} modules of rank {RANK}", flush=True)


def write(path: Path, shapes: Shapes, values: object) -> None:
    """A safetensors file, its tensors cut from a ring of random values."""
    import numpy as np

    assert isinstance(values, np.ndarray)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        while written < offset:
            piece = values[: (offset - written) // 2]
            file.write(piece.tobytes())
            written += piece.nbytes


if __name__ == "__main__":
    sys.exit(main())
