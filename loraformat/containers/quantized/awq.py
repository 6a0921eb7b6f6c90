"""AWQ, version gemm: 4-bit codes packed along the outputs in an interleaved order, a scale and a zero point a group.

The weight is stored transposed: rows of the output are columns of every part.

Source: autoawq 0.2.6, modules/linear/gemm.py, utils/packing_utils.py; gptqmodel 7.7.0, `dequantize_gemm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import ACROSS, CodedRows, Codes, unpacked
from loraformat.containers.quantized.codes import integer_table
from loraformat.containers.quantized.parts import (
    Held,
    dtype_of,
    finite_scales,
    modules_with,
    part,
    require_shape,
    whole,
    whole_number,
)
from loraformat.containers.quantized.settings import rewritten, settings_of, with_modules
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

_BITS, _PER_WORD = 4, 8


@dataclass(frozen=True, slots=True)
class _Layout:
    """How many inputs share a scale, and what is held of the files for the next window."""

    group: int
    held: Held


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    settings = settings_of(stored)
    assert settings is not None
    values = settings.values
    key = "bits" if "bits" in values else "w_bit"
    whole_number(dict(values), key, settings.file, _BITS)
    size = whole_number(dict(values), "group_size" if "group_size" in values else "q_group_size", settings.file)
    version = values.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        text = f"version {show(str(version), 40)} packs codes in another order, which is not supported"
        raise FormatError(text, where=settings.file, hint="only gemm is supported")
    held = Held()
    return {f"{module}.weight": _weight(stored, module, size, held) for module in modules_with(stored, ".qweight")}


def _weight(stored: Checkpoint, module: str, size: int, held: Held) -> QuantizedWeight:
    name = f"{module}.weight"
    codes, scales = part(stored, f"{module}.qweight", name), part(stored, f"{module}.scales", name)
    if len(codes.shape) != 2 or codes.dtype is not DType.I32:
        raise FormatError(f"{show(module, 200)}.qweight: expected a matrix of I32", where=codes.file)
    inputs, out = codes.shape[0], codes.shape[1] * _PER_WORD
    group = inputs if size == -1 else size
    if group < 1 or inputs % group:
        raise FormatError(f"{show(module, 200)}: groups of {size} do not divide {inputs} inputs", where=codes.file)
    said = f"group_size {size}"
    require_shape(f"{module}.scales", scales, (inputs // group, out), DType.F16, DType.BF16, DType.F32, reason=said)
    zeros = part(stored, f"{module}.qzeros", name)
    require_shape(f"{module}.qzeros", zeros, (inputs // group, codes.shape[1]), DType.I32, reason=said)
    dtype = scales.dtype if scales.dtype is not DType.F32 else dtype_of(stored, DType.F16)
    parts = tuple(f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    return QuantizedWeight(name, (out, inputs), dtype, parts, _Layout(group, held))


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`."""
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, _Layout)
    first, last = start // _PER_WORD, -(-stop // _PER_WORD)
    words, zeros = (layout.held.columns(stored, name, first, last) for name in weight.parts[:2])
    scales = layout.held.columns(stored, weight.parts[2], first * _PER_WORD, last * _PER_WORD).astype(np.float32)
    found = CodedRows(
        Codes(
            packed=words,
            order=ACROSS,
            cols=weight.shape[1],
            bits=_BITS,
            table=integer_table(_BITS),
            scales=finite_scales(scales, weight.parts[2]).T,
            zeros=unpacked(zeros, _BITS, len(zeros), ACROSS).astype(np.float32),
            run=layout.group,
        )
    )
    if (first * _PER_WORD, last * _PER_WORD) == (start, stop):
        return found
    return found.numbers()[start - first * _PER_WORD :][: stop - start]


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: output 8·w + p(k) stands in nibble k of word w."""
    import numpy as np

    assert isinstance(weight.layout, _Layout)
    group = weight.layout.group
    first, last = start // 8, -(-stop // 8)

    def of(name: str) -> NDArray[Any]:
        found = stored.weights[name]
        words = np.frombuffer(found.raw(0, found.rows), "<u4").reshape(found.shape)[:, first:last]
        spread = np.empty((len(words), words.shape[1] * 8))
        for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            spread[:, output::8] = (words >> np.uint32(4 * nibble)) % 16
        return spread[:, start - first * 8 :][:, : stop - start]

    scales = whole(stored, weight.parts[2])[:, start:stop].astype(np.float64)
    index = np.arange(weight.shape[1]) // group
    return np.asarray(((of(weight.parts[0]) - of(weight.parts[1])[index]) * scales[index]).T, np.float64)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Full paths in `modules_to_not_convert`."""

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        key = "modules_to_not_convert"
        return {**settings, key: with_modules(settings, key, modules, default=["lm_head"])}

    return rewritten(files, dense, kept, edited)
