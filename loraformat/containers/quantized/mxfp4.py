"""MXFP4 of gpt-oss: FP4 codes in groups of 32 with a power of two each, experts stacked and stored transposed.

Source: transformers 5.23.0, integrations/mxfp4.py `convert_moe_packed_tensors`; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes import CodedRows, Codes
from loraformat.containers.quantized.codes import fp4_table, powers_of_two
from loraformat.containers.quantized.parts import Held, dtype_of, finite_scales, part, require_shape
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
_GROUP, _NBYTES = 32, 16  # codes that share a scale, and their bytes
_MOST_ROWS = 64  # that the reference decodes at a time


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The quantized weights, (experts, in, out): the files have (experts, out, in). See `QuantizedScheme.weights`."""
    found, held = {}, Held()
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
        shape = (experts, groups * _GROUP, out)
        found[name] = QuantizedWeight(name, shape, dtype_of(stored), (codes, f"{name}{_SCALES}"), held)
    return found


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32] | CodedRows:
    """See `QuantizedScheme.rows`: inputs of experts, whose codes are columns of what is stored."""
    import numpy as np

    inputs = weight.shape[1]
    found = [
        _inputs(stored, weight, expert, max(0, start - expert * inputs), min(inputs, stop - expert * inputs))
        for expert in range(start // inputs, -(-stop // inputs))
    ]
    if len(found) == 1:
        return found[0]
    numbers = [one.numbers() if isinstance(one, CodedRows) else one for one in found]
    return np.concatenate([np.zeros((0, weight.shape[2]), np.float32), *numbers])


def _inputs(
    stored: Checkpoint, weight: QuantizedWeight, expert: int, start: int, stop: int
) -> NDArray[np.float32] | CodedRows:
    """(stop - start, out): some inputs of one expert."""
    first, last = start // _GROUP, -(-stop // _GROUP)
    codes, scales = (_of_expert(stored, weight, part, expert) for part in weight.parts[:2])
    found = CodedRows(
        Codes(
            packed=codes[:, first * _NBYTES : last * _NBYTES],
            cols=(last - first) * _GROUP,
            bits=4,
            table=fp4_table(),
            scales=finite_scales(powers_of_two(scales[:, first:last]), weight.parts[1]),
            run=_GROUP,
        ),
        is_transposed=True,
    )
    if (first * _GROUP, last * _GROUP) == (start, stop):
        return found
    return found.numbers()[start - first * _GROUP : stop - first * _GROUP]


def _of_expert(stored: Checkpoint, weight: QuantizedWeight, name: str, expert: int) -> NDArray[np.uint8]:
    """(out, bytes): one expert of a part."""
    import numpy as np

    held = weight.layout
    assert isinstance(held, Held)
    out = weight.shape[2]
    read = stored.weights[name].raw
    return held.get((name, expert), lambda: np.frombuffer(read(expert, expert + 1), np.uint8).reshape(out, -1))


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`: sign, exponent and digit of each code, from its own byte."""
    import numpy as np

    _, inputs, out = weight.shape
    found = np.empty((stop - start, out))
    row = start
    while row < stop:
        lines = np.arange(row, min(stop, row + _MOST_ROWS, (row // inputs + 1) * inputs))
        expert, place = row // inputs, lines % inputs
        raw = np.frombuffer(stored.weights[weight.parts[0]].raw(expert, expert + 1), "u1").reshape(out, inputs // 2)
        code = raw[:, place // 2].astype(np.int64) // 16 ** (place % 2) % 16
        power = np.frombuffer(stored.weights[weight.parts[1]].raw(expert, expert + 1), "u1").reshape(out, -1)
        scale = 2.0 ** (power[:, place // 32].astype(np.float64) - 127)
        found[lines - start] = single(four_bits(code) * scale).T
        row += len(lines)
    return found


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:
    """All experts of all layers: loaders of gpt-oss know no model of which only some experts are in MXFP4."""
    return set(weights) if touched else set()


def described(files: Mapping[str, Json], dense: Sequence[str], kept: Sequence[str]) -> Mapping[str, Json | None]:
    """Settings that stay, or none."""
    return rewritten(files, dense, kept, lambda settings, _modules: settings)
