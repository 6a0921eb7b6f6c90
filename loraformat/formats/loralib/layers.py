"""The layer types of loralib's factors, by their shapes: Linear, Embedding, MergedLinear, Conv2d.

Source: loralib 0.1.2, loralib/layers.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.diagnostics import counted, in_weights
from loraformat.errors import ConfigError
from loraformat.formats.kit.base import Hints
from loraformat.formats.kit.blocks import block_columns
from loraformat.formats.kit.pairs.read import Layer, base_shape
from loraformat.formats.kit.pairs.spelling import Pair
from loraformat.model.tensors import LazyTensor
from loraformat.model.updates import LowRank

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_TABLES = ("wte", "wpe")


def layer(module: str, pair: Pair, hints: Hints, tables: tuple[str, ...]) -> Layer:
    """The update of one module, without its scale.

    Args:
        tables: modules that are known to be embeddings.
    Raises: ConfigError (LF103): shapes that are not loralib's, do not fit the base, or leave open what is adapted.
    """
    a, b = pair.factors
    shape = base_shape(module, pair, hints)
    if len(a.shape) != 2 or len(b.shape) != 2 or not b.shape[1] or a.shape[0] % b.shape[1]:
        message = f"expected A (rank, in) and B (out, rank), found A {a.shape}, B {b.shape}"
        raise ConfigError(message, where=in_weights(module), hint="--from dump reads either orientation")
    parts = a.shape[0] // b.shape[1]
    if shape is not None and len(shape) == 4:
        return _convolution(module, a, b, shape)
    if parts > 1 or _is_one_part(b.shape[0], shape, hints):
        return _merged(module, a, b, shape, hints)
    if module in tables:
        return Layer(LowRank(a.T, b.T, None, is_embedding=True), b.shape[1])
    return _linear_or_table(module, a, b, shape, hints)


def _is_one_part(height: int, shape: tuple[int, ...] | None, hints: Hints) -> bool:
    """Whether B reaches one of several equal parts of the weight's rows, as `enable_lora` says."""
    count = len(hints.enable_lora or ())
    return count > 1 and shape is not None and height not in shape and height * count in shape


def _linear_or_table(module: str, a: LazyTensor, b: LazyTensor, shape: tuple[int, ...] | None, hints: Hints) -> Layer:
    rank, straight, transposed = b.shape[1], (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    is_called_table = "emb" in module.rpartition(".")[2].lower() or module.rpartition(".")[2] in _TABLES
    if shape is None and is_called_table:
        raise ConfigError(
            "only the base tells whether this is an embedding, whose factors mean the transpose",
            where=in_weights(module),
            hint="pass it with --base",
        )
    if shape not in (None, straight, transposed):
        raise ConfigError(f"A {a.shape} and B {b.shape} do not fit the weight {shape}", where=in_weights(module))
    if shape == transposed and is_called_table:
        return Layer(LowRank(a.T, b.T, None, is_embedding=True), rank)
    if shape == transposed != straight and hints.is_transposed(module) is None:
        raise ConfigError(
            f"the weight {shape} fits an embedding and a layer stored as (in, out)",
            where=in_weights(module),
            hint='use --assume fan_in_fan_out=true for a layer, false for an embedding, ["fc2"] for some layers',
        )
    if shape == transposed != straight and not hints.is_transposed(module):
        return Layer(LowRank(a.T, b.T, None, is_embedding=True), rank)
    return Layer(LowRank(b, a, None), rank)


def _merged(module: str, a: LazyTensor, b: LazyTensor, shape: tuple[int, ...] | None, hints: Hints) -> Layer:
    """MergedLinear: B_g @ A_g for each adapted part g of the rows, as one update with zeros between the blocks."""
    rank = b.shape[1]
    count = a.shape[0] // rank
    enabled = hints.enable_lora or _all_enabled(b.shape[0], count, shape)
    if enabled is None or sum(enabled) != count or b.shape[0] % count:
        given = "" if hints.enable_lora is None else f", enable_lora gives {sum(hints.enable_lora)}"
        raise ConfigError(
            f"the factors cover {counted(count, 'part')} of the rows, but the file does not say which{given}",
            where=in_weights(module),
            hint="use --assume enable_lora=[true,false,true] for query and value",
        )
    height = b.shape[0] // count
    rows = height * len(enabled)
    if shape is not None and rows not in shape:
        raise ConfigError(
            f"{len(enabled)} parts of {height} rows do not fit the weight {shape}", where=in_weights(module)
        )
    places = [number for number, is_on in enumerate(enabled) if is_on]
    blocks = [
        (b.rows(order * height, (order + 1) * height), [(place * height, (place + 1) * height)])
        for order, place in enumerate(places)
    ]
    return Layer(LowRank(block_columns(blocks, rows), a, None), rank)


def _all_enabled(height: int, count: int, shape: tuple[int, ...] | None) -> tuple[bool, ...] | None:
    """All parts, where the weight has no other rows."""
    return (True,) * count if shape is not None and height in shape else None


def _convolution(module: str, a: LazyTensor, b: LazyTensor, shape: tuple[int, ...]) -> Layer:
    """Conv2d: (B @ A).view(out, in, k, k), an update of rank (rank of A) · (rows of B for each output)."""
    out, width = shape[0], math.prod(shape[1:])
    each = b.shape[0] // out if out else 0
    if not each or each * out != b.shape[0] or each * a.shape[1] != width or a.shape[0] != b.shape[1]:
        raise ConfigError(f"A {a.shape} and B {b.shape} do not fit the convolution {shape}", where=in_weights(module))
    kernel_size = shape[2]
    if b.shape[1] % kernel_size:
        raise ConfigError(f"the columns of B {b.shape} are not a multiple of {kernel_size}", where=in_weights(module))
    up, down = b.reshape(out, each * b.shape[1]), _repeated(a, each)
    return Layer(LowRank(up, down, None, kernel=shape[2:]), b.shape[1] // kernel_size)


def _repeated(a: LazyTensor, count: int) -> LazyTensor:
    """(count · rows, count · cols): the matrix `count` times along the diagonal."""
    rows, cols = a.shape

    def read(start: int, stop: int) -> Values:
        import numpy as np

        values = a.load()
        whole = np.zeros((count, rows, count, cols), values.dtype)
        for number in range(count):
            whole[number, :, number] = values
        return whole.reshape(count * rows, count * cols)[start:stop]

    return LazyTensor((count * rows, count * cols), a.dtype, read)
