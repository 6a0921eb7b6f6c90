"""GGUF block types as a quantization scheme: each tensor holds its own codes and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from loraformat.containers.gguf.types import BY_NAME
from loraformat.errors import NonFiniteValue, UnsupportedUpdate
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

NAME = "GGUF"


def detect(stored: Checkpoint) -> bool:
    """See `QuantizedScheme.detect`: a tensor of the files is in a block type."""
    return any(tensor.block_type for tensor in stored.tensors.values())


def weights(stored: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """The weights in block types. Dense ones are F16, as llama.cpp's export-lora writes them."""
    found = {}
    for name, tensor in stored.tensors.items():
        if tensor.block_type:
            kind = BY_NAME[tensor.block_type]
            shape = (*tensor.shape[:-1], tensor.shape[-1] // kind.nbytes * kind.elements)
            found[name] = QuantizedWeight(name, shape, DType.F16, (name,), layout=kind)
    return found


def rows(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.float32]:
    """See `QuantizedScheme.rows`. Raises: UnsupportedUpdate (LF013): a block type whose codes are not read."""
    from loraformat.containers.gguf.blocks import are_finite, decode

    kind = BY_NAME[stored.tensors[weight.parts[0]].block_type]
    data = _blocks(stored, weight, start, stop)
    values = decode(kind.name, data, kind.elements)
    if not are_finite(kind.name, data, values):
        raise NonFiniteValue("a scale is NaN or infinite", where=weight.name)
    return values.reshape(stop - start, *weight.shape[1:])


def reference(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> Floats:
    """See `QuantizedScheme.reference`."""
    from loraformat.containers.gguf import block_reference

    kind = BY_NAME[stored.tensors[weight.parts[0]].block_type]
    found = block_reference.reference(kind.name, _blocks(stored, weight, start, stop), kind.elements)
    return found.reshape(stop - start, *weight.shape[1:])


def together(touched: AbstractSet[str], weights: AbstractSet[str]) -> AbstractSet[str]:  # noqa: ARG001
    """Each weight alone: llama.cpp loads tensors of any types beside each other."""
    return touched


def described(
    files: Mapping[str, Json],  # noqa: ARG001
    dense: Sequence[str],  # noqa: ARG001
    kept: Sequence[str],  # noqa: ARG001
) -> Mapping[str, Json | None]:
    """Nothing beside the weight file tells of its types."""
    return {}


def _blocks(stored: Checkpoint, weight: QuantizedWeight, start: int, stop: int) -> NDArray[np.uint8]:
    """(blocks, bytes) of rows of a weight."""
    import numpy as np

    from loraformat.containers.gguf.blocks import DECODERS

    (part,) = weight.parts
    kind = BY_NAME[stored.tensors[part].block_type]
    if kind.name not in DECODERS:
        known = ", ".join(DECODERS)
        raise UnsupportedUpdate(
            f"the weight is stored as {kind.name}, which is not supported",
            where=weight.name,
            hint=f"supported: {known}",
        )
    return np.frombuffer(stored.weights[part].raw(start, stop), np.uint8).reshape(-1, kind.nbytes)
