"""compressed-tensors: groups of modules, each with a format: packed integers, float8, int8, NVFP4, MXFP4.

Source: compressed-tensors 0.20.1, compressors/, quantization/quant_config.py, utils/match.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import CodedRows, Codes, unpacked
from loraformat.containers.quantized.codes import byte_table, fp4_table, integer_table, powers_of_two
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
from loraformat.containers.quantized.settings import Settings, rewritten, settings_of, with_modules
from loraformat.diagnostics import show
from loraformat.errors import FormatError, NonFiniteValue
from loraformat.matching import fused_with
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight, StoredTensor
from loraformat.model.patterns import fullmatch
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_FP4_GROUPS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
_EIGHT_BITS = ("float-quantized", "int-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_SCALES = (DType.BF16, DType.F16, DType.F32)
_BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of the settings: which modules, and how their weights are stored.

    Attributes:
        bits, is_float: of a code.
        size: inputs that share a scale; 0 where a whole row or the whole weight does.
        block: (rows, cols) that share a scale; (0, 0) where blocks are not used.
        required: parts without which codes would be read as something else, by the settings.
    """

    name: str
    targets: tuple[str, ...]
    format: str
    bits: int
    is_float: bool
    size: int
    block: tuple[int, int]
    required: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one weight is stored: its group, and its parts by what they are."""

    group: _Group
    parts: Mapping[str, str]


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    settings = settings_of(stored)
    assert settings is not None
    _refuse_unread(settings)
    groups = _groups(settings)
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in stored.tensors.items():
        module, mark, last = name.rpartition(".")
        if not mark:
            continue
        is_codes = last == "weight_packed" or (last == "weight" and tensor.dtype in (DType.F8_E4M3, DType.I8))
        if is_codes:
            found[f"{module}.weight"] = _weight(stored, module, _group_of(module, groups, tensor.file))
        elif last == "weight_scale" and not {f"{module}.weight_packed", f"{module}.weight"} & stored.tensors.keys():
            raise FormatError(f"{show(name, 200)} has no weight to scale", where=tensor.file)
    return found


def _refuse_unread(settings: Settings) -> None:
    transform = settings.values.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        text = "transform_config: the weights are stored in a rotated basis, which is not supported"
        raise FormatError(text, where=settings.file)
    sparsity = settings.values.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "dense"):
        raise FormatError(f"sparsity_config: the format {show(str(kind), 40)} is not supported", where=settings.file)


def _groups(settings: Settings) -> tuple[_Group, ...]:
    listed = settings.values.get("config_groups")
    if not isinstance(listed, Mapping) or not listed:
        raise FormatError("config_groups: expected groups of modules", where=settings.file)
    return tuple(_group(name, value, settings) for name, value in listed.items())


def _group(name: str, value: Json, settings: Settings) -> _Group:
    where = f"{settings.file}: config_groups.{show(name, 80)}"
    scheme = value.get("weights") if isinstance(value, Mapping) else None
    targets = value.get("targets") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(scheme, Mapping) or not isinstance(targets, list):
        raise FormatError("expected targets and weights", where=where)
    kind = value.get("format") or settings.values.get("format")
    if kind not in (_PACKED, *_EIGHT_BITS, *_FP4_GROUPS):
        text = f"the format {show(str(kind), 60)} is not supported"
        raise FormatError(text, where=where, hint=f"supported: {', '.join((_PACKED, *_EIGHT_BITS, *_FP4_GROUPS))}")
    bits, size, block = scheme.get("num_bits"), scheme.get("group_size"), scheme.get("block_structure")
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in (3, 4, 8):
        raise FormatError(f"num_bits: expected 3, 4 or 8, found {show(str(bits), 40)}", where=where)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < -1 or size == 0):
        raise FormatError(f"group_size: expected a positive number, found {show(str(size), 40)}", where=where)
    sizes = tuple(each for each in block if isinstance(each, int) and each > 0) if isinstance(block, list) else ()
    return _Group(
        name,
        tuple(target for target in targets if isinstance(target, str)),
        str(kind),
        bits,
        scheme.get("type") == "float",
        size if isinstance(size, int) and size > 0 else 0,
        (sizes[0], sizes[1]) if len(sizes) == 2 else (0, 0),
        _required(scheme),
    )


def _required(scheme: Mapping[str, Json]) -> tuple[str, ...]:
    """Zero points of codes that are not symmetric, and the group of each input where groups are not runs of inputs.

    Source: compressed-tensors 0.20.1, quantization/quant_args.py `validate_actorder`: orders that older versions wrote.
    """
    order = scheme.get("actorder")
    is_reordered = order is True or (isinstance(order, str) and order.lower() in ("group", "dynamic"))
    named = {"weight_zero_point": scheme.get("symmetric") is False, "weight_g_idx": is_reordered}
    return tuple(name for name, is_required in named.items() if is_required)


def _group_of(module: str, groups: Sequence[_Group], file: str) -> _Group:
    """The first group with a target that names the module, or the class of all linear modules."""
    for group in groups:
        for target in group.targets:
            if target == module or (not target.startswith("re:") and "." not in target and target.endswith("Linear")):
                return group
            if target.startswith("re:"):
                hit = fullmatch(f"(?:{target[3:]}).*", module)
                if hit is None:
                    raise FormatError(
                        f"the target {show(target, 80)} is a regular expression, which is not evaluated", where=file
                    )
                if hit:
                    return group
    raise FormatError(f"{show(module, 200)}: it is a target of no group in config_groups", where=file)


def _weight(stored: Checkpoint, module: str, group: _Group) -> QuantizedWeight:
    name = f"{module}.weight"
    for last in group.required:
        part(stored, f"{module}.{last}", name)
    if group.format in _FP4_GROUPS:
        shape, parts = _fp4(stored, module, group)
    elif group.format == _PACKED:
        shape, parts = _packed(stored, module, group)
    else:
        shape, parts = _eight_bits(stored, module, group)
    beside = {last: f"{module}.{last}" for last in _BESIDE if f"{module}.{last}" in stored.tensors}
    layout = _Layout(group, parts)
    return QuantizedWeight(name, shape, dtype_of(stored), tuple({**parts, **beside}.values()), layout)


def _fp4(stored: Checkpoint, module: str, group: _Group) -> tuple[tuple[int, ...], dict[str, str]]:
    name, codes = f"{module}.weight", f"{module}.weight_packed"
    tensor = part(stored, codes, name)
    if len(tensor.shape) != 2 or tensor.dtype is not DType.U8:
        raise FormatError(f"{show(codes, 200)}: expected a matrix of U8", where=tensor.file)
    out, inputs = tensor.shape[0], 2 * tensor.shape[1]
    size = _FP4_GROUPS[group.format]
    if inputs % size:
        raise FormatError(f"{show(codes, 200)}: groups of {size} do not divide {inputs} inputs", where=tensor.file)
    scales = f"{module}.weight_scale"
    dtypes = (DType.F8_E4M3,) if size == 16 else (DType.U8, DType.F8_E8M0)
    require_shape(scales, part(stored, scales, name), (out, inputs // size), *dtypes)
    parts = {"codes": codes, "scales": scales}
    if size == 16:
        total = f"{module}.weight_global_scale"
        require_shape(total, part(stored, total, name), (1,), DType.F32)
        parts["total"] = total
    return (out, inputs), parts


def _packed(stored: Checkpoint, module: str, group: _Group) -> tuple[tuple[int, ...], dict[str, str]]:
    name, codes = f"{module}.weight", f"{module}.weight_packed"
    tensor, shape_name = part(stored, codes, name), f"{module}.weight_shape"
    require_shape(shape_name, part(stored, shape_name, name), (2,), DType.I64, DType.I32)
    out, inputs = (int(size) for size in whole(stored, shape_name))
    words = -(-inputs * group.bits // 32) if group.bits == 3 else -(-inputs // (32 // group.bits))
    if min(out, inputs) < 1 or tensor.shape != (out, words) or tensor.dtype is not DType.I32:
        text = f"{show(codes, 200)} has the shape {list(tensor.shape)}, expected {[out, words]}"
        raise FormatError(f"{text}: weight_shape {[out, inputs]} at {group.bits} bits", where=tensor.file)
    parts = {"codes": codes, "scales": f"{module}.weight_scale"}
    groups = -(-inputs // group.size) if group.size else 1
    scales = part(stored, parts["scales"], name)
    grid = scales.shape if groups == 1 and scales.shape == (1,) else (out, groups)
    reason = f"group_size {group.size or None} and weight_shape {[out, inputs]}"
    require_shape(parts["scales"], scales, grid, *_SCALES, reason=reason)
    zeros, indices = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    if zeros in stored.tensors:
        require_shape(zeros, part(stored, zeros, name), (-(-out * group.bits // 32), groups), DType.I32)
        parts["zeros"] = zeros
    if indices in stored.tensors:
        require_shape(indices, part(stored, indices, name), (inputs,), DType.I32)
        parts["indices"] = indices
    return (out, inputs), {**parts, "shape": shape_name}


def _eight_bits(stored: Checkpoint, module: str, group: _Group) -> tuple[tuple[int, ...], dict[str, str]]:
    name, scales = f"{module}.weight", f"{module}.weight_scale"
    tensor, grid = part(stored, name, name), part(stored, scales, name)
    if len(tensor.shape) != 2:
        raise FormatError(f"{show(name, 200)}: expected a matrix, found {list(tensor.shape)}", where=tensor.file)
    if group.is_float != (tensor.dtype is DType.F8_E4M3):
        kind = "float" if group.is_float else "int"
        text = f"{show(name, 200)} is {tensor.dtype.safetensors}, the settings say {kind}"
        raise FormatError(text, where=tensor.file)
    wanted = _grid(tensor, group)
    if grid.dtype not in _SCALES:
        raise FormatError(f"{show(scales, 200)} is {grid.dtype.safetensors}, no dtype of scales", where=grid.file)
    if grid.shape not in wanted:
        expected = " or ".join(str(list(one)) for one in wanted)
        text = f"{show(scales, 200)} has the shape {list(grid.shape)}, expected {expected}"
        raise FormatError(text, where=grid.file)
    parts = {"codes": name, "scales": scales}
    zeros = f"{module}.weight_zero_point"
    if zeros in stored.tensors:
        require_shape(zeros, part(stored, zeros, name), grid.shape, DType.I8)
        parts["zeros"] = zeros
    return tensor.shape, parts


def _grid(tensor: StoredTensor, group: _Group) -> tuple[tuple[int, ...], ...]:
    """The shapes that the scales of an 8-bit weight may have."""
    out, inputs = tensor.shape
    if group.block[0]:
        return ((-(-out // group.block[0]), -(-inputs // group.block[1])),)
    if group.size:
        return ((out, -(-inputs // group.size)),)
    return ((out, 1), (1,), ())


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`."""
    layout, inputs = weight.layout, weight.shape[1]
    assert isinstance(layout, _Layout)
    group = layout.group
    if group.format in _FP4_GROUPS:
        return _fp4_rows(stored, layout, start, stop)
    index = _index(stored, layout)
    scales, zeros = _grid_rows(stored, weight, layout, start, stop)
    packed = raw_rows(stored, layout.parts["codes"], start, stop)
    if group.format == _PACKED:
        table = integer_table(group.bits, -(1 << (group.bits - 1)))
    else:
        table = byte_table(stored.tensors[layout.parts["codes"]].dtype)
    return CodedRows(
        Codes(
            packed=packed,
            cols=inputs,
            bits=group.bits if group.format == _PACKED else 8,
            table=table,
            scales=scales,
            zeros=zeros,
            run=(group.block[1] or group.size or inputs) if scales.shape[1] > 1 else inputs,
            index=index if scales.shape[1] > 1 else None,
        )
    )


def _fp4_rows(stored: Checkpoint, layout: _Layout, start: int, stop: int) -> CodedRows:
    import numpy as np

    size = _FP4_GROUPS[layout.group.format]
    scales = part_rows(stored, layout.parts["scales"], start, stop)
    if size == 16:
        total = np.float32(whole(stored, layout.parts["total"])[0])
        if not np.isfinite(total) or total == 0:
            raise NonFiniteValue(f"the scale of the whole weight is {float(total)}", where=layout.parts["total"])
        scales = scales / total
    elif stored.tensors[layout.parts["scales"]].dtype is DType.U8:
        scales = powers_of_two(scales)
    finite_scales(scales, layout.parts["scales"])
    codes = raw_rows(stored, layout.parts["codes"], start, stop)
    return CodedRows(Codes(packed=codes, cols=2 * codes.shape[1], bits=4, table=fp4_table(), scales=scales, run=size))


def _grid_rows(
    stored: Checkpoint, weight: QuantizedWeight, layout: _Layout, start: int, stop: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scales and zero points of some rows, (stop - start, groups) each; None where there are no zero points."""
    import numpy as np

    group, name = layout.group, layout.parts["scales"]
    shape, lines = stored.tensors[name].shape, np.arange(start, stop)
    if len(shape) < 2:
        low, high, at = 0, 1, np.zeros(stop - start, np.intp)
    else:
        height = group.block[0] or 1
        low, high = start // height, -(-stop // height)
        at = lines // height - low
    groups = shape[1] if len(shape) == 2 else 1
    scales = part_rows(stored, name, low, high).astype(np.float32).reshape(high - low, groups)
    scales = finite_scales(scales, name)[at]
    if "zeros" not in layout.parts:
        return scales, None
    if group.format != _PACKED:
        zeros = part_rows(stored, layout.parts["zeros"], low, high).reshape(high - low, groups)[at]
        return scales, np.asarray(zeros, np.float32)
    # Packed along the rows, whose words begin where the bits of a code and of a word begin together.
    step = 32 // group.bits if 32 % group.bits == 0 else 32
    first = start // step * step
    last = min(-(-weight.shape[0] * group.bits // 32), -(-stop * group.bits // 32))
    words = part_rows(stored, layout.parts["zeros"], first * group.bits // 32, last)
    unsigned = unpacked(words.T, group.bits, stop - first)[:, start - first :].T
    return scales, np.asarray(unsigned.astype(np.float32) - np.float32(1 << (group.bits - 1)))


def _index(stored: Checkpoint, layout: _Layout) -> NDArray[np.int32] | None:
    """The group of each input, where groups are not runs of inputs."""
    import numpy as np

    if "indices" not in layout.parts:
        return None
    found = whole(stored, layout.parts["indices"])
    groups = stored.tensors[layout.parts["scales"]].shape[-1]
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise FormatError("weight_g_idx: an index is out of range", where=layout.parts["indices"])
    return np.asarray(found, np.int32)


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: element by element from the bits of its own code."""
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, _Layout)
    group, names, inputs = layout.group, layout.parts, weight.shape[1]
    place = np.arange(inputs)

    def raw(key: str, code: str, first: int = start, last: int = stop) -> NDArray[Any]:
        found = stored.weights[names[key]]
        return np.frombuffer(found.raw(first, last), code).reshape(last - first, *found.shape[1:])

    if group.format in _FP4_GROUPS:
        code = raw("codes", "u1")[:, place // 2].astype(np.int64) // 16 ** (place % 2) % 16
        values = four_bits(code)
        scale = raw("scales", "u1").astype(np.int64)
        if "total" in names:
            total = float(raw("total", "<f4", 0, 1)[0])
            return single(values * single(eight_bits(scale) / total)[:, place // 16])
        return single(values * (2.0 ** (scale - 127.0))[:, place // 32])
    return _reference_integers(stored, weight, layout, start, stop)


def _reference_integers(stored: Checkpoint, weight: QuantizedWeight, layout: _Layout, start: int, stop: int) -> Floats:
    import numpy as np

    group, names, (out, inputs) = layout.group, layout.parts, weight.shape

    def fields(words: NDArray[Any], count: int) -> Floats:
        """The first `count` signed codes of lines of words."""
        place = np.arange(count) * group.bits
        wide = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], axis=1).view(np.uint32).astype(np.uint64)
        both = wide[:, place // 32] | wide[:, place // 32 + 1] << np.uint64(32)
        unsigned = (both >> (place % 32).astype(np.uint64)) & np.uint64(2**group.bits - 1)
        return np.asarray(unsigned.astype(np.float64) - 2.0 ** (group.bits - 1), np.float64)

    lines, place = np.arange(start, stop), np.arange(inputs)
    is_packed = group.format == _PACKED
    codes = fields(whole(stored, names["codes"]), inputs) if is_packed else _unpacked(stored, names["codes"])
    grid = whole(stored, names["scales"]).astype(np.float64)
    if grid.ndim < 2:
        grid = np.broadcast_to(grid.reshape(1, 1), (out, 1))
    at = lines // group.block[0] if group.block[0] else lines
    if "indices" in names:
        across = whole(stored, names["indices"])
    else:
        width = group.block[1] or group.size or inputs
        across = place // width
    result = codes[start:stop]
    if "zeros" in names:
        zero = whole(stored, names["zeros"])
        zero = fields(np.ascontiguousarray(zero.T), out).T if is_packed else np.broadcast_to(zero, grid.shape)
        result = result - zero[at[:, None], across[None, :]]
    return single(result * grid[at[:, None], across[None, :]])


def _unpacked(stored: Checkpoint, name: str) -> Floats:
    import numpy as np

    weight = stored.weights[name]
    code = np.frombuffer(weight.raw(0, weight.rows), "u1").reshape(weight.shape)
    if weight.dtype is DType.F8_E4M3:
        return eight_bits(code.astype(np.int64))
    return np.asarray(code.view(np.int8), np.float64)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Full paths in `ignore`."""

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        return {**settings, "ignore": with_modules(settings, "ignore", modules)}

    return rewritten(files, dense, kept, edited)
