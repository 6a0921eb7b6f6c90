"""The zip that torch.save writes, read strictly: which tensors it holds and where. Nothing in it is executed.

`torch.load` is not used, not even with `weights_only=True`: it ignores the CRCs of the archive, accepts compressed
records and views larger than their storage, and has had holes of the code-execution class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.containers.rows import read_raw_rows, read_rows
from loraformat.containers.sniff import HEAD_NBYTES, refuse_foreign
from loraformat.containers.torch_file.pickle_subset import MOST_NBYTES, Storage, View, read_pickle
from loraformat.containers.torch_file.state_dict import find_state_dict
from loraformat.containers.torch_file.zip_directory import Record, check_record, read_directory
from loraformat.diagnostics import show
from loraformat.errors import ContainerError, InvalidHeader, NotATensorFile
from loraformat.model.bundle import Json
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import LazyTensor, Span
from loraformat.storage.base import Source

if TYPE_CHECKING:
    from loraformat.model.tensors import Values


_MOST_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Archive:
    """What a torch file holds.

    Attributes:
        tensors: name → place, in the order of the file.
        records: the archive's records by name.
        wrapper, extras: see `model.bundle.Tensors`.
        nbytes: size of the file.
    """

    tensors: Mapping[str, StoredTensor]
    records: Mapping[str, Record]
    wrapper: tuple[str, ...]
    extras: Mapping[str, Json]
    nbytes: int


def read_archive(store: Source, path: str, *, lone: str = "") -> Archive:
    """The tensors of a torch file by name, as places in the file.

    Args:
        lone: the name of a tensor that was saved by itself; "" refuses a file of one.

    Raises:
        NotATensorFile (LF002): another kind of file, which is named.
        TruncatedFile (LF004), InvalidHeader (LF003): the zip is cut short or breaks a rule.
        UnsafePickle (LF007): the pickle has anything beyond tensors and plain values.
        ContainerError (LF001): a tensor that does not fit its storage, TorchScript, another byte order, a wrong CRC.
        StorageError (LF020): the file cannot be read.
    """
    records, value = _opened(store, path)
    found = find_state_dict({lone: value} if lone and isinstance(value, View) else value, path)
    tensors = {name: _placed(name, view, records, path) for name, view in found.tensors.items()}
    return Archive(tensors, records, found.wrapper, found.extras, store.size(path))


def lazy_tensor(store: Source, path: str) -> LazyTensor:
    """The tensor of a torch file that holds one tensor and no dict. Raises as `read_archive`."""
    records, value = _opened(store, path)
    if not isinstance(value, View):
        raise ContainerError("expected one tensor", where=path)
    archive = Archive({path: _placed(path, value, records, path)}, records, (), {}, store.size(path))
    return lazy_tensors(store, path, archive)[path]


def _opened(store: Source, path: str) -> tuple[Mapping[str, Record], object]:
    """(the records of the archive by name, the value of its pickle)."""
    records = read_directory(store, path, _sized(store, path))
    _check_kind(store, path, records)
    return records, read_pickle(_record_bytes(store, path, records, "data.pkl", MOST_NBYTES), path)


def lazy_tensors(store: Source, path: str, archive: Archive) -> dict[str, LazyTensor]:
    """Every tensor of the file by name. When one is first loaded, the CRC-32 of its record is checked."""
    checked: set[str] = set()

    def lazy(tensor: StoredTensor) -> LazyTensor:
        assert tensor.storage is not None
        record = archive.records[tensor.storage.partition("@")[0]]

        def check() -> None:
            if record.name not in checked:
                check_record(store, path, record)
                checked.add(record.name)

        def read(start: int, stop: int) -> Values:
            check()
            return read_rows(store, tensor, start, stop)

        def raw(start: int, stop: int) -> bytearray:
            check()
            return read_raw_rows(store, tensor, start, stop)

        return LazyTensor(tensor.shape, tensor.dtype, read, raw if tensor.strides is None else None)

    return {name: lazy(tensor) for name, tensor in archive.tensors.items()}


def check_records(store: Source, path: str) -> None:
    """Raises: ContainerError: a record of the torch file `path` does not have its CRC-32; and all of `read_archive`."""
    for record in read_archive(store, path).records.values():
        check_record(store, path, record)


def _sized(store: Source, path: str) -> int:
    nbytes = store.size(path)
    head = store.read(path, 0, min(nbytes, HEAD_NBYTES))
    refuse_foreign(head, path, zip_is_foreign=False)
    if not head.startswith(b"PK\x03\x04"):
        what = "empty" if not head else "neither a safetensors file nor the zip that torch.save writes"
        raise NotATensorFile(f"the file is {what}", where=path)
    return nbytes


def _check_kind(store: Source, path: str, records: Mapping[str, Record]) -> None:
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise ContainerError(
            "a TorchScript archive, which contains code", where=path, hint="save its state_dict() with torch.save"
        )
    if "data.pkl" not in records:
        raise NotATensorFile("a zip without data.pkl: torch.save did not write it", where=path)
    if "byteorder" in records:
        order = _record_bytes(store, path, records, "byteorder", 16)
        if order != b"little":
            raise ContainerError(f"{show(order)}-endian file; only little-endian is supported", where=path)
    version = _record_bytes(store, path, records, "version", 16).strip() if "version" in records else b"3"
    if not (version.isdigit() and 1 <= int(version) <= 10):
        raise ContainerError(f"format version {show(version)}; only versions 1 to 10 are supported", where=path)


def _record_bytes(store: Source, path: str, records: Mapping[str, Record], name: str, limit: int) -> bytes:
    record = records[name]
    if record.nbytes > limit:
        raise InvalidHeader(f'record "{name}" has {record.nbytes} bytes, at most {limit} are read', where=path)
    check_record(store, path, record)
    return store.read(path, record.offset, record.nbytes)


def _placed(name: str, view: View, records: Mapping[str, Record], where: str) -> StoredTensor:
    shown = show(name, 200)
    record = records.get(f"data/{view.storage.key}")
    if record is None:
        raise ContainerError(f'{shown}: its record "data/{show(view.storage.key)}" is missing', where=where)
    count = _storage_numel(shown, view, record, where)
    _check_view(shown, view, count, where)
    size = view.dtype.itemsize
    if _is_contiguous(view.shape, view.strides):
        span = Span(record.offset + view.offset * size, math.prod(view.shape) * size)
        return StoredTensor(where, view.dtype, view.shape, span, storage=f"{record.name}@{view.offset}")
    span = Span(record.offset, record.nbytes)
    return StoredTensor(where, view.dtype, view.shape, span, view.strides, view.offset, record.name)


def _storage_numel(shown: str, view: View, record: Record, where: str) -> int:
    """Elements of the view's storage; its record must be exactly as long."""
    storage: Storage = view.storage
    unit = storage.dtype.itemsize if storage.dtype else 1
    if storage.numel < 0 or storage.numel * unit != record.nbytes or record.nbytes % view.dtype.itemsize:
        found = f'record "{show(record.name)}" has {record.nbytes} bytes'
        raise ContainerError(f"{shown}: a storage of {storage.numel} elements, but {found}", where=where)
    return record.nbytes // view.dtype.itemsize


def _check_view(shown: str, view: View, count: int, where: str) -> None:
    """Every element of the view is one of `count` elements, and there are no more of them than that."""
    numbers = (view.offset, *view.shape, *view.strides)
    if len(view.shape) != len(view.strides) or len(view.shape) > _MOST_DIMENSIONS:
        raise ContainerError(f"{shown}: {len(view.shape)} sizes and {len(view.strides)} strides", where=where)
    if any(number < 0 or number >= 1 << 53 for number in numbers):
        raise ContainerError(f"{shown}: a size, stride or offset below 0 or beyond 53 bits", where=where)
    numel = math.prod(view.shape)
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if numel and (last >= count or numel > count):
        described = f"shape {list(view.shape)} with strides {list(view.strides)} from element {view.offset} on"
        raise ContainerError(f"{shown}: {described} does not fit a storage of {count} elements", where=where)
    if math.prod(max(size, 1) for size in view.shape) * view.dtype.itemsize >= 1 << 63 or view.offset > count:
        raise ContainerError(f"{shown}: an empty tensor outside its storage, or too large", where=where)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements stand row-major without gaps; strides of axes of length 1 say nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return not math.prod(shape)
        expected *= size
    return True
