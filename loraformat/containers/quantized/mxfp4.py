"""MXFP4 of gpt-oss: FP4 codes in groups of 32 with a power of two each, experts stacked and stored transposed.

Source: transformers 5.23.0, integrations/mxfp4.py `convert_moe_packed_tensors`; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from loraformat.containers.quantized.codes import fp4_table, low_nibble_first, powers_of_two
from loraformat.containers.quantized.parts import dtype_of, finite_scales, part, part_rows, require_shape
from loraformat.containers.quantized.reference import four_bits, single
from loraformat.containers.quantized.settings import rewritten
from loraformat.diagnostics import show
from loraformat.errors import FormatError
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_CODES, _SCALES = "_blocks", "_scales"
_NBYTES = 16  # of a group of 32 codes


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights, (experts, in, out): the files have (experts, out, in). See `QuantizedScheme.weights`."""
    found = {}
    for codes, tensor in stored.tensors.items():
        if not codes.endswith(_CODES):
            continue
        name = codes.removesuffix(_CODES)
        if len(tensor.shape) != 4 or tensor.shape[3] != _NBYTES or tensor.dtype is not DType.U8:
            text = f"{show(codes, 200)}: expected U8 (experts, out, groups, {_NBYTES}), found {list(tensor.shape)}"
            raise FormatError(text, where=tensor.file)
        part(stored, codes, name)
        require_shape(f"{name}{_SCALES}", part(stored, f"{name}{_SCALES}", name), tensor.shape[:3], DType.U8)
        experts, out, groups, _ = tensor.shape
        shape = (experts, groups * 2 * _NBYTES, out)
        found[name] = QuantizedWeight(name, shape, dtype_of(stored), (codes, f"{name}{_SCALES}"))
    return found


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32]:
    """See `QuantizedScheme.rows`: whole experts."""
    import numpy as np

    found = np.empty((stop - start, *weight.shape[1:]), np.float32)
    for expert in range(start, stop):  # one at a time: codes of all of them as float32 would be large
        codes = low_nibble_first(part_rows(stored, weight.parts[0], expert, expert + 1)[0])
        exponents = part_rows(stored, weight.parts[1], expert, expert + 1)[0]
        scales = powers_of_two(exponents)
        finite_scales(scales, weight.parts[1])
        values = fp4_table()[codes] * scales[..., None]
        found[expert - start] = values.reshape(weight.shape[2], weight.shape[1]).T
    return found


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: sign, exponent and digit of each code, from its own byte."""
    import numpy as np

    experts, (_, inputs, out) = stop - start, weight.shape
    raw = np.frombuffer(stored.weights[weight.parts[0]].raw(start, stop), "u1").reshape(experts, out, inputs // 2)
    place = np.arange(inputs)
    code = raw[:, :, place // 2].astype(np.int64) // 16 ** (place % 2) % 16
    power = np.frombuffer(stored.weights[weight.parts[1]].raw(start, stop), "u1").reshape(experts, out, -1)
    scale = 2.0 ** (power.astype(np.float64)[:, :, place // 32] - 127)
    values = single(four_bits(code) * scale)
    return np.asarray(values.transpose(0, 2, 1))


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """All experts of all layers: loaders of gpt-oss know no model of which only some experts are in MXFP4."""
    return set(weights) if touched else set()


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Settings that stay, or none."""
    return rewritten(files, dense, kept, lambda settings, _modules: settings)
