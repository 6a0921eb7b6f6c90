"""The only ways of the reference to values: rows of a base's tensor, of a factor, and the headers of the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.containers import open_weights, read_raw_rows, read_rows
from loraformat.containers.quantized import laid_out, reference_rows
from loraformat.merger.inputs import Inputs
from loraformat.model.bundle import OpenedFiles
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.floats import decoded, float64_of
from loraformat.model.tensors import LazyTensor
from loraformat.strict_json import parse

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_INDEX_NBYTES = 100_000_000


def base_rows(inputs: Inputs, stored: StoredTensor, start: int, stop: int) -> Floats:
    """Rows of a tensor of the base in float64, trailing axes flattened.

    Those of a quantized weight are decoded by the reference of its scheme, which shares no arithmetic with what the
    merge reads. Which stored tensors belong to a weight, and its shape, are given by the scheme once for both.
    """
    if stored.encoded:
        assert inputs.base.quantized is not None
        values = reference_rows(inputs.base.quantized, stored, start, stop)
        return values.reshape(stop - start, math.prod(stored.shape[1:]))
    return rows_of(inputs.store, stored, start, stop)


def rows_of(store: OpenedFiles, stored: StoredTensor, start: int, stop: int) -> Floats:
    """Rows of a tensor in float64, trailing axes flattened; a scalar has one row."""
    import numpy as np

    if stored.strides is None and stored.dtype.is_floating:
        values = decoded(read_raw_rows(store, stored, start, stop), stored.dtype)
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            values = read_rows(store, stored, start, stop).astype(np.float64)
    return values.reshape(stop - start, math.prod(stored.shape[1:]))


def factor_values(factor: LazyTensor) -> Floats:
    """All values of a tensor of an adapter, in its shape."""
    return float64_of(factor)


def factor_rows(factor: LazyTensor, start: int, stop: int) -> Floats:
    """Rows of a tensor of an adapter, trailing axes flattened; one of shape () has one row."""
    values = float64_of(factor.rows(start, stop) if factor.shape else factor)
    return values.reshape(stop - start, math.prod(factor.shape[1:]))


def headers(inputs: Inputs) -> Mapping[str, StoredTensor]:
    """The tensors of the base's files as they are called there, whatever was done to their names since."""
    base = inputs.base
    if base.quantized is not None:
        return laid_out(base, base.quantized.weights.keys()).tensors
    if not base.layers and base.task is None:
        return base.tensors
    _, tensors = open_weights(inputs.store, base.files)
    if base.index is None:
        return tensors
    data = inputs.store.read(base.index, 0, inputs.store.files()[base.index])
    index = parse(bytes(data), base.index, limit=_INDEX_NBYTES)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    assert isinstance(listed, dict)
    return {name: tensor for name, tensor in tensors.items() if name in listed}


def as_rows(stored: StoredTensor, axes: int) -> StoredTensor:
    """A tensor whose first `axes` axes are one, so that its rows are those of a stack of matrices."""
    if axes == 1 or len(stored.shape) < axes:
        return stored
    shape = (math.prod(stored.shape[:axes]), *stored.shape[axes:])
    return replace(stored, shape=shape, strides=None if stored.strides is None else stored.strides[axes - 1 :])
