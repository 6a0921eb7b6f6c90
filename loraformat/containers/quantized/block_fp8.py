"""FP8 weights with a scale for each block of rows and columns, or one for the whole, as DeepSeek and Qwen publish them.

Source: transformers 5.23.0, integrations/finegrained_fp8.py; deepseek-ai/DeepSeek-V3, inference/fp8_cast_bf16.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import CodedRows, Codes
from loraformat.containers.quantized.codes import byte_table, powers_of_two
from loraformat.containers.quantized.parts import Held, dtype_of, finite_scales, part, raw_rows, whole
from loraformat.containers.quantized.reference import eight_bits, single
from loraformat.containers.quantized.settings import rewritten, settings_of, with_modules
from loraformat.diagnostics import show
from loraformat.errors import FormatError
from loraformat.matching import fused_with
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight, StoredTensor
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

# What follows the name of a weight's module: transformers, Mistral, DeepSeek V4.
_SCALES = (".weight_scale_inv", ".qscale_weight", ".scale")
_BESIDE = (".activation_scale", ".input_scale", ".qscale_act")
_MOST_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Block:
    """How many weights share a scale.

    Attributes:
        rows, cols: of a block; 0 where one scale is for all.
        held: scales of the last weights that were decoded.
    """

    rows: int
    cols: int
    held: Held = field(default_factory=Held, compare=False)


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    settings = settings_of(stored)
    assert settings is not None
    block = _block(settings.values.get("weight_block_size"), settings.file)
    found = {}
    for name, tensor in stored.tensors.items():
        if tensor.dtype in (DType.F8_E4M3, DType.F8_E5M2) and len(tensor.shape) in (2, 3):
            found[name] = _weight(stored, name, tensor, block)
    used = {part for weight in found.values() for part in weight.parts}
    for name, tensor in stored.tensors.items():
        if name.endswith(_SCALES[0]) and name not in used:
            text = (
                f"{show(name, 200)} has no weight to scale: {show(name.removesuffix('_scale_inv'), 200)} is not float8"
            )
            raise FormatError(text, where=tensor.file)
    return found


def _block(value: Json, where: str) -> Block:
    if value is None:
        return Block(0, 0)
    listed = value if isinstance(value, list) else []
    sizes = [size for size in listed if type(size) is int and 0 < size <= _MOST_BLOCK]
    if not len(listed) == len(sizes) == 2:
        raise FormatError(f"weight_block_size: expected two sizes, found {show(str(value), 80)}", where=where)
    return Block(sizes[0], sizes[1])


def _weight(stored: Checkpoint, name: str, tensor: StoredTensor, block: Block) -> QuantizedWeight:
    part(stored, name, name)
    module = name.removesuffix(".weight")
    scales = next((f"{module}{end}" for end in _SCALES if f"{module}{end}" in stored.tensors), "")
    scales = scales or next((f"{name}{end}" for end in ("_scale_inv",) if f"{name}{end}" in stored.tensors), "")
    grid = part(stored, scales or f"{module}{_SCALES[0]}", name)
    *lead, height, width = tensor.shape
    if block.rows:
        # Never derived from the shapes: 192 rows with 2 scales are blocks of 128, not of 96.
        wanted = (*lead, -(-height // block.rows), -(-width // block.cols))
    else:
        wanted = tuple(lead)
        if grid.shape in ((1,), (*lead, 1, 1)) or (math.prod(grid.shape) == 1 and not lead):
            wanted = grid.shape
    if grid.shape != wanted:
        said = f"blocks of {block.rows} x {block.cols}" if block.rows else "no weight_block_size"
        text = (
            f"{show(scales, 200)} has the shape {list(grid.shape)}, {said} and {list(tensor.shape)} want {list(wanted)}"
        )
        raise FormatError(text, where=grid.file)
    if grid.dtype not in (DType.F32, DType.BF16, DType.F16, DType.F8_E8M0, DType.U8):
        raise FormatError(
            f"{show(scales, 200)} is {grid.dtype.safetensors}, expected a dtype of scales", where=grid.file
        )
    beside = tuple(f"{module}{end}" for end in _BESIDE if f"{module}{end}" in stored.tensors)
    return QuantizedWeight(name, tensor.shape, dtype_of(stored), (name, scales, *beside), block)


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`."""
    import numpy as np

    block, (*lead, height, width) = weight.layout, weight.shape
    assert isinstance(block, Block)
    name = weight.parts[1]
    scales, matrices = block.held.get((name, 0), lambda: _scales(stored, name)), np.arange(start, stop) // height
    if block.rows:
        grid = scales.reshape(-1, *scales.shape[-2:])
        each = grid[matrices, np.arange(start, stop) % height // block.rows]
    else:
        is_each = bool(lead) and scales.size > 1
        each = scales.reshape(-1)[matrices if is_each else np.zeros_like(matrices), None]
    table = byte_table(stored.tensors[weight.parts[0]].dtype)
    codes = raw_rows(stored, weight.parts[0], start, stop)
    return CodedRows(Codes(packed=codes, cols=width, bits=8, table=table, scales=each, run=block.cols or width))


def _scales(stored: Checkpoint, name: str) -> NDArray[Any]:
    """All scales of a weight as float32; exponents as powers of two."""
    import numpy as np

    dtype = stored.tensors[name].dtype
    values = whole(stored, name)
    if dtype is DType.U8:
        # Of E8M0 as bytes; 2^(e - 127).
        values = powers_of_two(values)
    return finite_scales(values.astype(np.float32), name)


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: sign, exponent and digits of each code, and the scale of its place."""
    import numpy as np

    *lead, height, width = weight.shape
    tensor, grid = stored.tensors[weight.parts[0]], stored.tensors[weight.parts[1]]
    code = raw_rows(stored, weight.parts[0], start, stop).astype(np.int64)
    value = eight_bits(code, 3 if tensor.dtype is DType.F8_E4M3 else 2)
    raw = stored.weights[weight.parts[1]].raw(0, stored.weights[weight.parts[1]].rows)
    if grid.dtype in (DType.U8, DType.F8_E8M0):
        scale = (2.0 ** (np.frombuffer(raw, "u1").astype(np.float64) - 127)).reshape(grid.shape)
    else:
        scale = _scales(stored, weight.parts[1]).astype(np.float64)
    block, lines = weight.layout, np.arange(start, stop)
    assert isinstance(block, Block)
    if not block.rows:
        each = scale.reshape(-1)[lines // height, None] if lead and scale.size > 1 else scale.reshape(-1)[0]
        return single(value * each)
    across = np.arange(width) // block.cols
    down = lines % height // block.rows
    each = scale[(lines // height)[:, None], down[:, None], across] if lead else scale[down[:, None], across]
    return single(value * each)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Full paths in `modules_to_not_convert`, or in its alias `ignored_layers` where the base has that."""

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        key = "ignored_layers" if "ignored_layers" in settings else "modules_to_not_convert"
        return {**settings, key: with_modules(settings, key, modules, default=["lm_head"])}

    return rewritten(files, dense, kept, edited)
