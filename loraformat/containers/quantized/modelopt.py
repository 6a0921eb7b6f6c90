"""ModelOpt: NVFP4 with a float8 scale a group and one of the whole, and FP8 with one scale.

Source: nvidia-modelopt 0.47.0, torch/quantization/qtensor/nvfp4_tensor.py, torch/export/unified_export_hf.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import CodedRows, Codes
from loraformat.containers.quantized.codes import byte_table, fp4_table
from loraformat.containers.quantized.parts import (
    dtype_of,
    finite_scales,
    part,
    part_rows,
    raw_rows,
    require_shape,
    whole,
)
from loraformat.containers.quantized.reference import eight_bits, four_bits, single
from loraformat.containers.quantized.settings import rewritten, settings_of, with_modules
from loraformat.diagnostics import show
from loraformat.errors import FormatError, NonFiniteValue
from loraformat.matching import fused_with
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_GROUP = 16
_BESIDE = (".input_scale", ".pre_quant_scale")
_ALGORITHMS = ("NVFP4", "FP8")


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    settings = settings_of(stored)
    assert settings is not None
    algorithm = settings.values.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        text = f"quant_algo {show(str(algorithm), 40)} is not supported"
        raise FormatError(text, where=settings.file, hint=f"only {' and '.join(_ALGORITHMS)} are read")
    found = {}
    for name, tensor in stored.tensors.items():
        module, mark, last = name.rpartition(".")
        if mark and last == "weight" and tensor.dtype in (DType.U8, DType.F8_E4M3) and len(tensor.shape) == 2:
            is_packed = tensor.dtype is DType.U8
            if is_packed != (algorithm == "NVFP4"):
                text = f"{show(name, 200)} is {tensor.dtype.safetensors}, which {algorithm} does not store"
                raise FormatError(text, where=tensor.file)
            found[name] = _four_bits(stored, module) if is_packed else _eight_bits(stored, module)
        elif mark and last in ("weight_scale", "weight_scale_2"):
            part(stored, f"{module}.weight", f"{module}.weight")
    return found


def _four_bits(stored: Checkpoint, module: str) -> QuantizedWeight:
    name, scales, total = (f"{module}.{last}" for last in ("weight", "weight_scale", "weight_scale_2"))
    out, width = part(stored, name, name).shape
    inputs = 2 * width
    if inputs % _GROUP:
        text = f"{show(name, 200)}: groups of {_GROUP} do not divide {inputs} inputs"
        raise FormatError(text, where=stored.tensors[name].file)
    require_shape(scales, part(stored, scales, name), (out, inputs // _GROUP), DType.F8_E4M3)
    if math.prod(part(stored, total, name).shape) != 1 or stored.tensors[total].dtype is not DType.F32:
        raise FormatError(f"{show(total, 200)}: expected one F32", where=stored.tensors[total].file)
    return QuantizedWeight(name, (out, inputs), dtype_of(stored), (name, scales, total, *_beside(stored, module)))


def _eight_bits(stored: Checkpoint, module: str) -> QuantizedWeight:
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    tensor = part(stored, scale, name)
    if math.prod(tensor.shape) != 1 or not tensor.dtype.is_floating:
        raise FormatError(f"{show(scale, 200)}: expected one number", where=tensor.file)
    return QuantizedWeight(
        name, stored.tensors[name].shape, dtype_of(stored), (name, scale, *_beside(stored, module)), "FP8"
    )


def _beside(stored: Checkpoint, module: str) -> tuple[str, ...]:
    if f"{module}{_BESIDE[1]}" in stored.tensors:
        text = (
            f"{show(module, 200)}: its inputs are scaled before the product (pre_quant_scale), which is not supported"
        )
        raise FormatError(text, where=stored.tensors[f"{module}{_BESIDE[1]}"].file)
    return (f"{module}{_BESIDE[0]}",) if f"{module}{_BESIDE[0]}" in stored.tensors else ()


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`. The second scale multiplies the first."""
    import numpy as np

    codes, width = raw_rows(stored, weight.parts[0], start, stop), weight.shape[1]
    if weight.layout == "FP8":
        scales = np.broadcast_to(_one(stored, weight.parts[1]), (stop - start, 1))
        table = byte_table(stored.tensors[weight.parts[0]].dtype)
        return CodedRows(Codes(packed=codes, cols=width, bits=8, table=table, scales=scales, run=width))
    scales = finite_scales(part_rows(stored, weight.parts[1], start, stop), weight.parts[1])
    scales = scales * _one(stored, weight.parts[2])
    return CodedRows(Codes(packed=codes, cols=width, bits=4, table=fp4_table(), scales=scales, run=_GROUP))


def _one(stored: Checkpoint, name: str) -> np.float32:
    import numpy as np

    value: np.float32 = np.float32(whole(stored, name).reshape(-1)[0])
    if not np.isfinite(value) or value == 0:
        raise NonFiniteValue(f"the scale of the whole weight is {float(value)}", where=name)
    return value


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: sign, exponent and digits of each code, from its own byte."""
    import numpy as np

    shape = (stop - start, weight.shape[1])
    raw = np.frombuffer(stored.weights[weight.parts[0]].raw(start, stop), "u1").reshape(stop - start, -1)
    if weight.layout == "FP8":
        code = raw.astype(np.int64)
        total = float(whole(stored, weight.parts[1]).reshape(-1)[0])
        return single(eight_bits(code) * total).reshape(shape)
    place = np.arange(weight.shape[1])
    code = raw[:, place // 2].astype(np.int64) // 16 ** (place % 2) % 16
    groups = np.frombuffer(stored.weights[weight.parts[1]].raw(start, stop), "u1").reshape(stop - start, -1)
    total = float(np.frombuffer(stored.weights[weight.parts[2]].raw(0, 1), "<f4")[0])
    scale = single(eight_bits(groups.astype(np.int64)) * total)
    return single(four_bits(code) * scale[:, place // _GROUP])


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Full paths in `ignore` of config.json, and in `exclude_modules` of hf_quant_config.json."""

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        key = "exclude_modules" if "exclude_modules" in settings else "ignore"
        if "quant_method" not in settings and "ignore" not in settings:
            key = "exclude_modules"
        return {**settings, key: with_modules(settings, key, modules, default=["lm_head"])}

    return rewritten(files, dense, kept, edited)
