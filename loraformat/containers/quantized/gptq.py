"""GPTQ: codes of 2, 3, 4 or 8 bits packed along the inputs, a scale and a zero point for each group of inputs.

The weight is stored transposed: rows of the output are columns of every part.

Source: gptqmodel 7.7.0, nn_modules/qlinear/torch.py `dequantize_weight`, utils/model.py `convert_gptq_v1_to_v2_format`;
transformers 5.23.0, quantizers/quantizer_gptq.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import CodedRows, Codes, unpacked
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
from loraformat.containers.quantized.settings import Settings, rewritten, settings_of
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

_WORD = 32
_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a weight is packed.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, where no tensor says the group of each.
        added: what is added to a stored zero point: 1 in version 1.
        held: what is there of the files for the next window.
    """

    bits: int
    group: int
    added: int
    held: Held


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights. See `QuantizedScheme.weights`."""
    settings = settings_of(stored)
    assert settings is not None
    bits = whole_number(dict(settings.values), "bits", settings.file, 2, 3, 4, 8)
    size = whole_number(dict(settings.values), "group_size", settings.file)
    label = settings.values.get("checkpoint_format", "gptq")
    if label not in _FORMATS:
        text = f"checkpoint_format {show(str(label), 40)} stores permuted codes, which are not supported"
        raise FormatError(text, where=settings.file, hint="only gptq and gptq_v2 are supported")
    found = {}
    for module in modules_with(stored, ".qweight"):
        if settings.values.get("desc_act") is True and size != -1:
            # Without it the group of an input would be guessed from its place.
            part(stored, f"{module}.g_idx", f"{module}.weight")
        found[f"{module}.weight"] = _weight(stored, module, bits, size)
    added, remark = _added(stored, settings, bits, list(found))
    held = Held()
    return {
        name: QuantizedWeight(name, one.shape, one.dtype, one.parts, _Layout(bits, one.layout, added, held), remark)  # type: ignore[arg-type]
        for name, one in found.items()
    }


def _weight(stored: Checkpoint, module: str, bits: int, size: int) -> QuantizedWeight:
    """A weight whose layout is the size of its groups."""
    name = f"{module}.weight"
    codes, scales = part(stored, f"{module}.qweight", name), part(stored, f"{module}.scales", name)
    if len(codes.shape) != 2 or codes.dtype is not DType.I32 or len(scales.shape) != 2:
        text = f"{show(module, 200)}.qweight: expected a matrix of I32 with a matrix of scales"
        raise FormatError(text, where=codes.file)
    words, out = codes.shape
    parts = [f"{module}.qweight", f"{module}.qzeros", f"{module}.scales"]
    indices = stored.tensors.get(f"{module}.g_idx")
    inputs = indices.shape[0] if indices is not None and len(indices.shape) == 1 else words * _WORD // bits
    if -(-inputs * bits // _WORD) != words:
        words_wanted = -(-inputs * bits // _WORD)
        text = f"{show(module, 200)}.qweight has {words} rows, {inputs} inputs of {bits} bits take {words_wanted}"
        raise FormatError(text, where=codes.file)
    group = inputs if size == -1 else size
    if group < 1:
        raise FormatError(f"group_size: expected -1 or a positive number, found {size}", where=codes.file)
    groups = -(-inputs // group)
    said = f"bits {bits} and group_size {size}"
    require_shape(f"{module}.scales", scales, (groups, out), DType.F16, DType.BF16, DType.F32, reason=said)
    zeros = part(stored, f"{module}.qzeros", name)
    require_shape(f"{module}.qzeros", zeros, (groups, -(-out * bits // _WORD)), DType.I32, reason=said)
    if indices is not None:
        require_shape(f"{module}.g_idx", indices, (inputs,), DType.I32)
        parts.append(f"{module}.g_idx")
    dtype = scales.dtype if scales.dtype is not DType.F32 else dtype_of(stored, DType.F16)
    return QuantizedWeight(name, (out, inputs), dtype, tuple(parts), group)


def _added(stored: Checkpoint, settings: Settings, bits: int, names: Sequence[str]) -> tuple[int, str]:
    """What is added to stored zero points, and a remark where that is not simply what the label says.

    The label lies in published checkpoints, by which every weight would move by one scale. Symmetric codes have the
    zero point 2^(bits-1): stored as it is in version 2, one less in version 1.

    Raises: FormatError (LF012): the codes are symmetric by the settings, and zero points are neither.
    """
    said = settings.values.get("checkpoint_format", "gptq")
    by_label = 0 if said == "gptq_v2" else 1
    if settings.values.get("sym") is not True:
        text = f"codes are asymmetric, so only checkpoint_format tells how zero points are stored: it is {said}"
        return by_label, text
    middle = 1 << (bits - 1)
    seen: set[int] = set()
    for name in names:
        module = name.removesuffix(".weight")
        out = stored.tensors[f"{module}.qweight"].shape[1]
        fields = unpacked(whole(stored, f"{module}.qzeros"), bits, out)
        seen |= set(fields.reshape(-1).tolist()) if fields.size < 4096 else set(_distinct(fields))
        if not seen <= {middle, middle - 1} or len(seen) > 1:
            text = f"the settings say sym, but zero points are {', '.join(map(str, sorted(seen)[:4]))}"
            hint = f"expected {middle} (v2) or {middle - 1} (v1) throughout"
            raise FormatError(text, where=f"{module}.qzeros", hint=hint)
    added = 0 if seen == {middle} else 1
    if not seen or added == by_label:
        return by_label, ""
    true = "gptq" if added else "gptq_v2"
    return (
        added,
        f"checkpoint_format says {said}, all zero points are {min(seen)} as in {true}; the zero points were trusted",
    )


def _distinct(fields: NDArray[np.uint8]) -> Iterator[int]:
    import numpy as np

    return (int(value) for value in np.flatnonzero(np.bincount(fields.reshape(-1), minlength=256)))


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`."""
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, _Layout)
    words = layout.held.columns(stored, weight.parts[0], start, stop)
    scales = layout.held.columns(stored, weight.parts[2], start, stop).astype(np.float32)
    return CodedRows(
        Codes(
            packed=words.T,
            cols=weight.shape[1],
            bits=layout.bits,
            table=integer_table(layout.bits),
            scales=finite_scales(scales, weight.parts[2]).T,
            zeros=_zeros(stored, weight, layout, start, stop).astype(np.float32).T,
            run=layout.group,
            index=_groups(stored, weight, len(scales)),
        )
    )


def _zeros(stored: Checkpoint, weight: QuantizedWeight, layout: _Layout, start: int, stop: int) -> NDArray[np.uint8]:
    """(groups, stop - start): the zero points of some outputs, each taken modulo 2^bits."""
    import numpy as np

    # The words that hold them begin where the bits of a code and of a word begin together.
    step = _WORD // layout.bits if _WORD % layout.bits == 0 else _WORD
    first = start // step * step
    width = stored.tensors[weight.parts[1]].shape[1]
    last = min(width, -(-stop * layout.bits // _WORD))
    words = layout.held.columns(stored, weight.parts[1], first * layout.bits // _WORD, last)
    stored_ones = unpacked(words, layout.bits, stop - first)[:, start - first :]
    return np.asarray((stored_ones + np.uint8(layout.added)) & np.uint8((1 << layout.bits) - 1), np.uint8)


def _groups(stored: Checkpoint, weight: QuantizedWeight, count: int) -> NDArray[np.int32] | None:
    """The group of each input; None where groups are runs of inputs.

    Raises: FormatError (LF012): an index is out of range.
    """
    import numpy as np

    layout = weight.layout
    assert isinstance(layout, _Layout)
    if len(weight.parts) == 3:
        return None
    found = whole(stored, weight.parts[3])
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise FormatError(f"g_idx: an index is not below {count}, the number of groups", where=weight.parts[3])
    is_run = np.array_equal(found, np.arange(len(found), dtype=np.int64) // layout.group)
    return None if is_run else np.asarray(found, np.int32)


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: whole tensors, and each code out of the bits of its column as one number."""
    import numpy as np

    layout, inputs = weight.layout, weight.shape[1]
    assert isinstance(layout, _Layout)

    def of(name: str, code: str) -> NDArray[Any]:
        found = stored.weights[name]
        return np.frombuffer(found.raw(0, found.rows), code).reshape(found.shape)

    def field(words: NDArray[Any], count: int) -> NDArray[Any]:
        """The first `count` codes of rows of words."""
        place = np.arange(count) * layout.bits
        wide = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], axis=1).astype(np.uint64)
        low, high = wide[:, place // 32], wide[:, place // 32 + 1]
        found: NDArray[Any] = (low | high << np.uint64(32)) >> (place % 32).astype(np.uint64)
        return np.asarray(found & np.uint64(2**layout.bits - 1))

    codes = field(of(weight.parts[0], "<u4").T[start:stop], inputs).astype(np.float64)
    zeros = field(of(weight.parts[1], "<u4"), stop)[:, start:]
    zeros = ((zeros + np.uint64(layout.added)) % np.uint64(2**layout.bits)).astype(np.float64)
    scales = whole(stored, weight.parts[2]).astype(np.float64)
    groups = of(weight.parts[3], "<i4") if len(weight.parts) > 3 else np.arange(inputs) // layout.group
    return np.asarray((codes - zeros.T[:, groups]) * scales[:, start:stop].T[:, groups], np.float64)


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """See `QuantizedScheme.together`."""
    return fused_with(touched, weights)


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """A pattern `-:^path$` in `dynamic` for each module that is dense.

    Source: gptqmodel 7.7.0, quantization/config.py `dynamic_get`; vllm 0.33.0, quantization/utils/gptq_utils.py.
    """

    def edited(settings: Mapping[str, Json], modules: Sequence[str]) -> Mapping[str, Json]:
        found = settings.get("dynamic")
        listed = dict(found) if isinstance(found, Mapping) else {}
        empty: dict[str, Json] = {}
        return {**settings, "dynamic": {**listed, **{f"-:^{re.escape(module)}$": dict(empty) for module in modules}}}

    return rewritten(files, dense, kept, edited)
