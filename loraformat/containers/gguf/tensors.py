"""The tensors of a GGUF file, as stored and decoded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from loraformat.containers.gguf.blocks import DECODERS, decode
from loraformat.containers.gguf.header import Array, Header, TensorInfo, Value
from loraformat.containers.rows import read_raw_rows, read_rows
from loraformat.errors import UnsupportedUpdate
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, LazyTensor
from loraformat.storage.base import Source

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


def stored(path: str, info: TensorInfo) -> StoredTensor:
    """A tensor with its file; one in a block type as rows of its bytes."""
    kind = info.type
    if kind.dtype is not None:
        return StoredTensor(path, kind.dtype, info.shape, info.span)
    shape = (*info.shape[:-1], kind.row_nbytes(info.shape[-1]))
    return StoredTensor(path, DType.U8, shape, info.span, block_type=kind.name)


def lazy_tensors(store: Source, path: str, header: Header) -> dict[str, LazyTensor]:
    """Every tensor of the file by name, none of them loaded; those in block types as float32."""
    return {name: _lazy(store, path, name, info) for name, info in header.tensors.items()}


def plain_settings(header: Header) -> dict[str, Json]:
    """The settings of a header as JSON values; of long arrays there is the length alone."""
    return {key: _plain(field.value) for key, field in header.fields.items()}


def _plain(value: Value) -> Json:
    if isinstance(value, Array):
        return {"type": value.type, "count": value.count} if value.items is None else list[Json](value.items)
    return value


def _lazy(store: Source, path: str, name: str, info: TensorInfo) -> LazyTensor:
    tensor = stored(path, info)
    if not tensor.block_type:
        return LazyTensor(
            info.shape, tensor.dtype, partial(read_rows, store, tensor), partial(read_raw_rows, store, tensor)
        )
    kind = info.type

    def read(start: int, stop: int) -> Values:
        if kind.name not in DECODERS:
            known = ", ".join(DECODERS)
            text = f"the tensor is stored as {kind.name}, which is not supported"
            raise UnsupportedUpdate(text, where=name, hint=f"supported: {known}")
        blocks = read_rows(store, tensor, start, stop).reshape(-1, kind.nbytes)
        values: Values = decode(kind.name, blocks, kind.elements)
        return values.reshape(stop - start, *info.shape[1:])

    return LazyTensor(info.shape, DType.F32, read)
