"""The zip of arrays that numpy.savez and mlx.core.savez write, and the array that numpy.save writes, read strictly.

Source: numpy 2.4, numpy/lib/_format_impl.py (npy versions 1 to 3); mlx 0.32, mlx/io/load.cpp (bfloat16 as "V2").
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from loraformat.containers.rows import read_rows
from loraformat.containers.torch_file.zip_directory import Record, check_record, read_directory
from loraformat.diagnostics import show
from loraformat.errors import ContainerError, InvalidHeader, NotATensorFile
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.storage.base import Source

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_MAGIC = b"\x93NUMPY"
_MOST_HEADER_NBYTES = 1 << 16
_MOST_DIMENSIONS = 8

_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-zA-Z]\d{1,2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,16}, ?)*(?:\d{1,16})?)\),? ?\}\s*"
)
_DTYPES = {
    "<f8": DType.F64,
    "<f4": DType.F32,
    "<f2": DType.F16,
    "<V2": DType.BF16,
    "|V2": DType.BF16,
    "<i8": DType.I64,
    "<i4": DType.I32,
    "<i2": DType.I16,
    "|i1": DType.I8,
    "<u4": DType.U32,
    "|u1": DType.U8,
    "|b1": DType.BOOL,
}


def read_arrays(store: Source, path: str) -> dict[str, LazyTensor]:
    """Every array of the file by name; the CRC-32 of a record is checked when its array is first loaded.

    Raises:
        NotATensorFile (LF002): no zip, or one with other files than arrays.
        TruncatedFile (LF004), InvalidHeader (LF003): the zip is cut short, breaks a rule or is compressed.
        ContainerError (LF001): an array of a dtype that is not read, or one whose size is not that of its record.
        StorageError (LF020): the file cannot be read.
    """
    nbytes = store.size(path)
    if store.read(path, 0, min(nbytes, 4)) != b"PK\x03\x04":
        raise NotATensorFile("the file is not the zip that savez writes", where=path)
    records = read_directory(store, path, nbytes, has_folder=False)
    strangers = [name for name in records if not name.endswith(".npy")]
    if strangers:
        raise NotATensorFile(f'"{show(strangers[0])}" is not a NumPy array', where=path)
    return {name.removesuffix(".npy"): _lazy(store, path, record) for name, record in records.items()}


def read_array(store: Source, path: str) -> LazyTensor:
    """The array of a `.npy` file. Raises: as `read_arrays`, but for the zip."""
    stored = _placed(store, path, Record(path, 0, store.size(path), 0))
    return LazyTensor(stored.shape, stored.dtype, lambda start, stop: read_rows(store, stored, start, stop))


def _lazy(store: Source, path: str, record: Record) -> LazyTensor:
    stored = _placed(store, path, record)
    checked: list[bool] = []

    def read(start: int, stop: int) -> Values:
        if not checked:
            check_record(store, path, record)
            checked.append(True)
        return read_rows(store, stored, start, stop)

    return LazyTensor(stored.shape, stored.dtype, read)


def _placed(store: Source, path: str, record: Record) -> StoredTensor:
    shown = show(record.name)
    head = store.read(path, record.offset, min(record.nbytes, 12))
    if head[:6] != _MAGIC or len(head) < 12 or head[6] not in (1, 2, 3):
        raise InvalidHeader(f'record "{shown}" does not begin like a NumPy array', where=path)
    wide = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + wide], "little")
    start = 8 + wide + length
    if length > _MOST_HEADER_NBYTES or start > record.nbytes:
        raise InvalidHeader(f'record "{shown}": a header of {length} bytes', where=path)
    text = store.read(path, record.offset + 8 + wide, length).decode("latin-1")
    if "'descr': '|O'" in text:
        raise InvalidHeader(
            f'record "{shown}" holds Python objects in a pickle, which is not executed',
            where=path,
            hint="save it with a dtype of numbers: np.save(path, array.astype('float32'))",
        )
    found = _HEADER.fullmatch(text)
    if found is None:
        raise InvalidHeader(f'record "{shown}": unreadable header "{show(text, 100)}"', where=path)
    dtype = _DTYPES.get(found[1])
    if dtype is None:
        raise ContainerError(f'record "{shown}": the dtype "{found[1]}" is not supported', where=path)
    shape = tuple(int(size) for size in found[3].split(",") if size.strip())
    data = record.nbytes - start
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) * dtype.itemsize != data:
        raise ContainerError(f'record "{shown}": shape {list(shape)} does not fill {data} bytes', where=path)
    strides = _column_major(shape) if found[2] == "True" and len(shape) > 1 else None
    return StoredTensor(path, dtype, shape, Span(record.offset + start, data), strides)


def _column_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
