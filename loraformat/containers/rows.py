"""From bytes of a file to arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.errors import ContainerError
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, numbers_of
from loraformat.storage.base import Source

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


def read_rows(store: Source, tensor: StoredTensor, start: int, stop: int) -> Values:
    """Rows `start:stop` of the first axis, as an array of `tensor.dtype.numpy` in memory of their own.

    A strided view is gathered from the part of its storage that the rows touch. A tensor of shape `()` is read as rows
    0 to 1 and comes back with shape `()`.

    Raises: StorageError: the file is shorter than its header said. ContainerError: a BOOL that is neither 0 nor 1.
    """
    shape: tuple[int, ...] = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    if tensor.strides is not None and math.prod(shape) > 0:
        return _gathered(store, tensor, start, shape)
    return numbers_of(read_raw_rows(store, tensor, start, stop), tensor.dtype).reshape(shape)


def read_raw_rows(store: Source, tensor: StoredTensor, start: int, stop: int) -> bytearray:
    """The bytes of rows `start:stop` of a tensor without strides; a tensor of shape `()` has one row.

    Raises: as `read_rows`.
    """
    buffer = bytearray((stop - start) * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
    read_rows_into(store, tensor, start, stop, memoryview(buffer))
    return buffer


def read_rows_into(store: Source, tensor: StoredTensor, start: int, stop: int, buffer: memoryview) -> None:
    """The bytes of rows `start:stop` of a tensor without strides.

    Args:
        buffer: exactly as long as the rows.

    Raises: as `read_rows`.
    """
    row_nbytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    assert tensor.strides is None or not buffer.nbytes
    assert buffer.nbytes == (stop - start) * row_nbytes
    if buffer.nbytes:
        store.read_into(tensor.file, tensor.span.offset + start * row_nbytes, buffer)
        _check_bool(buffer, tensor)


def _gathered(store: Source, tensor: StoredTensor, start: int, shape: tuple[int, ...]) -> Values:
    import numpy as np

    strides = tensor.strides
    assert strides is not None
    first = tensor.offset + start * strides[0] if shape else tensor.offset
    count = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    itemsize = tensor.dtype.itemsize
    buffer = bytearray(count * itemsize)
    store.read_into(tensor.file, tensor.span.offset + first * itemsize, buffer)
    _check_bool(buffer, tensor)
    values = numbers_of(buffer, tensor.dtype)
    steps = tuple(stride * values.itemsize for stride in strides)
    return np.array(np.lib.stride_tricks.as_strided(values, shape, steps), order="C")


def _check_bool(buffer: bytearray | memoryview, tensor: StoredTensor) -> None:
    if tensor.dtype is DType.BOOL and bytes(buffer).translate(None, b"\x00\x01"):
        raise ContainerError("a BOOL tensor holds a byte that is neither 0 nor 1", where=tensor.file)
