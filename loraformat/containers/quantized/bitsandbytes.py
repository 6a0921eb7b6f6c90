"""bitsandbytes: NF4 and FP4 in blocks of the flat weight, with plain or quantized scales, and INT8 with a scale a row.

Source: bitsandbytes 0.50.2, functional.py `QuantState`, `dequantize_4bit`, `dequantize_blockwise`,
`int8_vectorwise_dequant`; transformers 5.23.0, quantizers/quantizer_bnb_4bit.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat import strict_json
from loraformat.arithmetic.codes import HIGH_FIRST, CodedRows, Codes
from loraformat.containers.quantized.codes import byte_table
from loraformat.containers.quantized.parts import (
    Held,
    dtype_of,
    finite_scales,
    matrix_of,
    modules_with,
    part,
    part_rows,
    raw_rows,
    require_shape,
    span_of_bytes,
    whole,
    whole_number,
)
from loraformat.containers.quantized.reference import single
from loraformat.containers.quantized.settings import rewritten, with_modules
from loraformat.diagnostics import show
from loraformat.errors import FormatError
from loraformat.matching import fused_with
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_STATE = ".weight.quant_state.bitsandbytes__"
MOST_STATE_NBYTES = 1 << 14
_MOST_DIMENSIONS = 4
# float32(1 / 127), by which the library multiplies a row's scale last.
INT8_STEP = 7.874015718698502e-3
# The code books that the library makes; a file with another one was not written by it.
# Source: bitsandbytes 0.50.2, functional.py `get_4bit_type`; Dettmers et al. 2023, arXiv 2305.14314, appendix E (NF4).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_CODE_BOOK_ERROR = 1e-6
FP4_SIZES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a 4-bit weight is laid out.

    Attributes:
        size: weights of a block, in the order of the flat weight.
        nested: scales of a block of scales, where they are quantized too; else 0.
        offset: what is added to each of those.
        held: scales and code books of the last weights that were decoded.
    """

    size: int
    held: Held
    nested: int = 0
    offset: float = 0.0


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    found: dict[str, QuantizedWeight] = {}
    held = Held()
    for name, tensor in stored.tensors.items():
        module, mark, kind = name.partition(_STATE)
        if mark:
            weight = _four_bits(stored, module, kind, held)
            found[weight.name] = weight
        elif name.endswith((".weight.absmax", ".weight.quant_map")):
            module = name.rpartition(".weight.")[0]
            if not any(f"{module}{_STATE}{kind}" in stored.tensors for kind in ("nf4", "fp4")):
                raise FormatError(f"{show(module, 200)}.weight: its quant_state is missing", where=tensor.file)
        elif name.endswith(".weight") and tensor.dtype is DType.I8 and len(tensor.shape) == 2:
            found[name] = _eight_bits(stored, name.removesuffix(".weight"))
    for module in modules_with(stored, ".SCB"):
        part(stored, f"{module}.weight", f"{module}.weight")
    return found


def _four_bits(stored: Checkpoint, module: str, kind: str, held: Held) -> QuantizedWeight:
    name, state_name = f"{module}.weight", f"{module}{_STATE}{kind}"
    codes, state_tensor = part(stored, name, name), stored.tensors[state_name]
    if kind not in ("nf4", "fp4"):
        raise FormatError(f"{show(name, 200)}: the type {show(kind, 40)} is neither nf4 nor fp4", where=codes.file)
    nbytes = math.prod(state_tensor.shape)
    if state_tensor.dtype is not DType.U8 or nbytes > MOST_STATE_NBYTES:
        text = f"{show(state_name, 200)} is not a quant_state: {nbytes} elements of {state_tensor.dtype.safetensors}"
        raise FormatError(text, where=codes.file)
    state = strict_json.parse(whole(stored, state_name).tobytes(), state_name, limit=MOST_STATE_NBYTES)
    shape, where = _shape(state, name), f"{state_name}"
    size = whole_number(state, "blocksize", where)
    if size < 32 or size & (size - 1):
        raise FormatError(f"blocksize: expected a power of two from 32 on, found {size}", where=where)
    if isinstance(state, dict) and state.get("quant_type") != kind:
        raise FormatError(f"quant_type: {show(str(state.get('quant_type')), 40)}, the name says {kind}", where=where)
    nbytes = math.prod(codes.shape) * codes.dtype.itemsize
    if -(-math.prod(shape) // 2) != nbytes:
        text = f"{show(name, 200)}: quant_state says the shape {list(shape)}, the codes are {nbytes} bytes"
        raise FormatError(text, where=codes.file)
    _check_code_book(stored, name, kind)
    blocks = -(-math.prod(shape) // size)
    parts, layout = _scales(stored, name, state, blocks, size, held)
    dtype = DType.by_torch_name(str(state.get("dtype"))) if isinstance(state, dict) else None
    if dtype is None or not dtype.is_floating:
        dtype = dtype_of(stored)
    return QuantizedWeight(name, shape, dtype, (name, *parts, f"{name}.quant_map", state_name), layout)


def _shape(state: Json, name: str) -> tuple[int, ...]:
    found = state.get("shape") if isinstance(state, dict) else None
    listed = found if isinstance(found, list) else []
    sizes = tuple(size for size in listed if type(size) is int and 0 < size < 1 << 40)
    if not 0 < len(sizes) == len(listed) <= _MOST_DIMENSIONS:
        raise FormatError(f"{show(name, 200)}: quant_state has no shape", where=name)
    return sizes


def _check_code_book(stored: Checkpoint, name: str, kind: str) -> None:
    """Refuse values of the 16 codes that are not those of the type: the file would mean something else."""
    tensor = part(stored, f"{name}.quant_map", name)
    require_shape(f"{name}.quant_map", tensor, (16,), DType.F32)
    wanted = NF4 if kind == "nf4" else (*FP4_SIZES, *(-size for size in FP4_SIZES))
    found = whole(stored, f"{name}.quant_map").tolist()
    if any(abs(one - other) > _CODE_BOOK_ERROR for one, other in zip(found, wanted, strict=True)):
        raise FormatError(f"{show(name, 200)}: quant_map is not that of {kind}", where=tensor.file)


def _scales(
    stored: Checkpoint, name: str, state: Json, blocks: int, size: int, held: Held
) -> tuple[tuple[str, ...], Blocks]:
    absmax = part(stored, f"{name}.absmax", name)
    assert isinstance(state, dict)
    if "nested_blocksize" not in state:
        require_shape(f"{name}.absmax", absmax, (blocks,), DType.F32)
        return (f"{name}.absmax",), Blocks(size, held)
    require_shape(f"{name}.absmax", absmax, (blocks,), DType.U8)
    nested = whole_number(state, "nested_blocksize", name)
    if nested < 1:
        raise FormatError(f"nested_blocksize: expected at least 1, found {nested}", where=name)
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise FormatError(f"nested_offset: expected a number, found {show(str(offset), 80)}", where=name)
    nested_absmax, nested_map = f"{name}.nested_absmax", f"{name}.nested_quant_map"
    require_shape(nested_absmax, part(stored, nested_absmax, name), (-(-blocks // nested),), DType.F32)
    require_shape(nested_map, part(stored, nested_map, name), (256,), DType.F32)
    return (f"{name}.absmax", nested_absmax, nested_map), Blocks(size, held, nested, float(offset))


def _eight_bits(stored: Checkpoint, module: str) -> QuantizedWeight:
    name, scales = f"{module}.weight", f"{module}.SCB"
    shape = part(stored, name, name).shape
    require_shape(scales, part(stored, scales, name), (shape[0],), DType.F32)
    parts = [name, scales]
    layout = f"{module}.weight_format"
    if layout in stored.tensors:
        require_shape(layout, part(stored, layout, name), (), DType.U8)
        order = int(whole(stored, layout))
        if order != 0:
            text = f"{show(name, 200)}: its codes are not in rows (weight_format {order})"
            raise FormatError(text, where=stored.tensors[layout].file)
        parts.append(layout)
    return QuantizedWeight(name, shape, dtype_of(stored), tuple(parts))


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`."""
    import numpy as np

    if not isinstance(weight.layout, Blocks):
        scales = finite_scales(part_rows(stored, weight.parts[1], start, stop), weight.parts[1])
        codes = raw_rows(stored, weight.parts[0], start, stop)
        table, width = byte_table(DType.I8), weight.shape[1]
        return CodedRows(
            Codes(packed=codes, cols=width, bits=8, table=table, scales=scales[:, None], run=width, factor=INT8_STEP)
        )
    width, size = matrix_of(weight.shape)[1], weight.layout.size
    first, last = start * width // 2 * 2, stop * width
    found = CodedRows(
        Codes(
            packed=span_of_bytes(stored, weight.parts[0], first // 2, -(-last // 2))[None],
            order=HIGH_FIRST,
            cols=last - first,
            bits=4,
            table=weight.layout.held.get((weight.parts[-2], 0), lambda: whole(stored, weight.parts[-2])),
            scales=_absmax(stored, weight)[None, first // size : -(-last // size)],
            run=size,
            first=first % size,
        )
    )
    if first == start * width:
        return found
    return np.asarray(found.numbers()[0, 1:].reshape(stop - start, width))


def _absmax(stored: Checkpoint, weight: QuantizedWeight) -> NDArray[np.float32]:
    """The scales of all blocks: a window of rows needs few of them, which takes longer to read than to decode."""
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, Blocks)

    def read() -> NDArray[np.float32]:
        values: NDArray[Any] = whole(stored, weight.parts[1])
        if layout.nested:
            nested = whole(stored, weight.parts[2])[np.arange(len(values)) // layout.nested]
            values = whole(stored, weight.parts[3])[values] * nested + np.float32(layout.offset)
        return finite_scales(np.asarray(values, np.float32), weight.parts[1])

    return layout.held.get((weight.parts[1], 0), read)


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: element by element from its flat index, with the roundings written out."""
    import numpy as np

    if not isinstance(weight.layout, Blocks):
        codes = _values(stored, weight.parts[0], "i1").reshape(weight.shape)[start:stop].astype(np.float64)
        scale = _values(stored, weight.parts[1], "<f4")[start:stop].astype(np.float64)
        return single(single(codes * scale[:, None]) * float(np.float32(INT8_STEP)))
    layout, width = weight.layout, matrix_of(weight.shape)[1]
    index = np.arange(start * width, stop * width)
    if not len(index):
        return np.zeros((0, width))
    byte = span_of_bytes(stored, weight.parts[0], index[0] // 2, index[-1] // 2 + 1)[index // 2 - index[0] // 2]
    codes = np.where(index % 2 == 0, byte // 16, byte % 16).astype(np.int64)
    scale, _ = reference_scales(stored, weight, index // layout.size)
    book = _values(stored, weight.parts[-2], "<f4").astype(np.float64)
    return single(book[codes] * scale).reshape(stop - start, width)


def reference_scales(stored: Checkpoint, weight: QuantizedWeight, block: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(scale of each of these blocks, the scale of that scale; 0 where scales are not quantized)."""
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, Blocks)
    if not layout.nested:
        return _values(stored, weight.parts[1], "<f4").astype(np.float64)[block], np.zeros(block.shape)
    codes = _values(stored, weight.parts[1], "u1")[block].astype(np.int64)
    inner = _values(stored, weight.parts[3], "<f4").astype(np.float64)[codes]
    outer = _values(stored, weight.parts[2], "<f4").astype(np.float64)[block // layout.nested]
    return single(single(inner * outer) + float(np.float32(layout.offset))), outer


def _values(stored: Checkpoint, name: str, code: str) -> NDArray[np.generic]:
    import numpy as np

    return np.frombuffer(stored.weights[name].raw(0, stored.weights[name].rows), code)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Full paths in `llm_int8_skip_modules`; an explicit list replaces the default, which is the head alone."""

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        key = "llm_int8_skip_modules"
        return {**settings, key: with_modules(settings, key, modules, default=["lm_head"])}

    return rewritten(files, dense, kept, edited)
