"""The `.metadata` of a torch.distributed checkpoint: its tensors, and the file and bytes of each shard.

Every number in it is checked before it is used: each tensor is covered by its shards exactly once, each shard is inside
a file of the folder, and no two share bytes.

Source: torch 2.13.0, distributed/checkpoint/filesystem.py `_StorageInfo`, `FileSystemReader.read_data`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loraformat.containers.distributed.metadata_pickle import IndexKey, Record, read_metadata_pickle
from loraformat.containers.torch_file.pickle_subset import dtype_of, integers_of
from loraformat.diagnostics import show
from loraformat.errors import ContainerError, InvalidHeader, TruncatedFile
from loraformat.model.tensors import DType

METADATA = ".metadata"
SUFFIX = ".distcp"
_MOST_DIMENSIONS = 8
_MOST_NUMBER = 1 << 53


@dataclass(frozen=True, slots=True)
class Shard:
    """A block of a tensor, and the bytes that torch.save wrote for it.

    Attributes:
        offsets, shape: of the block in the tensor.
        file: its name in the folder.
        start, nbytes: of the item in the file.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A tensor of the checkpoint; its shards cover it exactly once."""

    dtype: DType
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint.

    Attributes:
        tensors: by name.
        objects: names of other objects: settings, random states.
        files: names of the files in which all of it is.
    """

    tensors: Mapping[str, ShardedTensor]
    objects: tuple[str, ...]
    files: frozenset[str]


def read_contents(data: bytes, files: Mapping[str, int]) -> Contents:
    """What a `.metadata` file says.

    Args:
        files: name → bytes, of the folder.

    Raises:
        UnsafePickle (LF007): the pickle holds anything but the description of a checkpoint.
        InvalidHeader (LF003): a number that cannot be, shards that overlap or leave a hole, a name that leads out of
            the folder.
        TruncatedFile (LF004): an item ends after its file does.
        ContainerError (LF001): a file that is missing; compressed items; a dtype that is not read.
    """
    root = read_metadata_pickle(data, METADATA)
    described = _dict(_field(root, "Metadata", "state_dict_metadata"))
    stored = _dict(_field(root, "Metadata", "storage_data"))
    taken: dict[str, list[Shard]] = {}
    tensors: dict[str, ShardedTensor] = {}
    objects: list[str] = []
    for name, what in described.items():
        if not isinstance(name, str):
            raise InvalidHeader("a tensor name that is not a string", where=METADATA)
        if isinstance(what, Record) and what.kind == "BytesStorageMetadata":
            objects.append(name)
            _stored(show(name, 200), stored.get(IndexKey.of(name, None)), files)
            continue
        tensors[name] = _tensor(name, what, stored, files)
        for shard in tensors[name].shards:
            taken.setdefault(shard.file, []).append(shard)
    for file, shards in taken.items():
        _check_apart(file, shards)
    named = frozenset(_stored("an item", info, files)[0] for info in stored.values())
    return Contents(tensors, tuple(sorted(objects)), named)


def _tensor(name: str, what: object, stored: Mapping[object, object], files: Mapping[str, int]) -> ShardedTensor:
    shown = show(name, 200)
    shape = _sizes(_field(what, "TensorStorageMetadata", "size"), shown)
    dtype = dtype_of(_field(_field(what, "TensorStorageMetadata", "properties"), "TensorProperties", "dtype"))
    if dtype is None:
        raise ContainerError(f"{shown}: unsupported dtype", where=METADATA)
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise InvalidHeader(f"{shown}: shape {list(shape)} is too large", where=METADATA)
    chunks = _field(what, "TensorStorageMetadata", "chunks")
    if type(chunks) is not list:
        raise InvalidHeader(f"{shown}: its shards are not a list", where=METADATA)
    shards = []
    for chunk in chunks:
        offsets = _sizes(_field(chunk, "ChunkStorageMetadata", "offsets"), shown)
        sizes = _sizes(_field(chunk, "ChunkStorageMetadata", "sizes"), shown)
        info = stored.get(IndexKey.of(name, offsets), stored.get(IndexKey.of(name, None)))
        file, start, nbytes = _stored(shown, info, files)
        shards.append(Shard(offsets, sizes, file, start, nbytes))
    _check_grid(shown, shape, shards)
    return ShardedTensor(dtype, shape, tuple(sorted(shards, key=lambda shard: shard.offsets)))


def _stored(shown: str, info: object, files: Mapping[str, int]) -> tuple[str, int, int]:
    """(file, first byte, bytes) of an item."""
    if info is None:
        raise InvalidHeader(f"{shown}: the location of a shard is missing", where=METADATA)
    file, start, nbytes = (_field(info, "_StorageInfo", name) for name in ("relative_path", "offset", "length"))
    if isinstance(info, Record) and info.fields and info.fields.get("transform_descriptors"):
        raise ContainerError(f"{shown}: a compressed or encrypted shard, which is not supported", where=METADATA)
    if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
        raise InvalidHeader(f"{shown}: a shard in {_shown(file)}, which the folder does not contain", where=METADATA)
    if file not in files:
        raise ContainerError(f"{shown}: its shard's file {show(file, 80)} is missing", where=METADATA)
    if not _is_count(start) or not _is_count(nbytes):
        raise InvalidHeader(f"{shown}: a shard at byte {_shown(start)} of {_shown(nbytes)} bytes", where=METADATA)
    assert isinstance(start, int)
    assert isinstance(nbytes, int)
    if start + nbytes > files[file]:
        raise TruncatedFile(f"a shard of {shown} ends at byte {start + nbytes}, the file at {files[file]}", where=file)
    return file, start, nbytes


def _shown(value: object) -> str:
    """A value for a message; of anything but a text or a number its type alone, for it may be nested without end."""
    return show(value, 80) if isinstance(value, (str, int)) else f"a {type(value).__name__}"


def _check_grid(shown: str, shape: tuple[int, ...], shards: Sequence[Shard]) -> None:
    """The shards are the cells of a grid, each there once: then they cover the tensor, and none overlap.

    Raises: InvalidHeader (LF003).
    """
    if any(len(shard.offsets) != len(shape) or len(shard.shape) != len(shape) for shard in shards):
        raise InvalidHeader(f"{shown}: a shard whose number of axes is not {len(shape)}", where=METADATA)
    if not shards or len({shard.offsets for shard in shards}) != len(shards):
        what = "no shards" if not shards else "two shards at the same offsets"
        raise InvalidHeader(f"{shown}: {what}", where=METADATA)
    cells = 1
    for axis, size in enumerate(shape):
        starts = sorted({shard.offsets[axis] for shard in shards})
        lengths = {first: after - first for first, after in pairwise([*starts, size])}
        cells *= len(starts)
        if starts[0] or any(shard.shape[axis] != lengths[shard.offsets[axis]] for shard in shards):
            text = f"{shown}: along axis {axis} its shards overlap, leave gaps, or do not form a regular grid of {size}"
            raise InvalidHeader(text, where=METADATA)
    if cells != len(shards):
        raise InvalidHeader(f"{shown}: {len(shards)} shards, but the grid has {cells} cells", where=METADATA)


def _check_apart(file: str, shards: Sequence[Shard]) -> None:
    """Raises: InvalidHeader (LF003): two items of a file share bytes."""
    ordered = sorted(shards, key=lambda shard: (shard.start, shard.nbytes))
    for one, other in pairwise(ordered):
        if one.start + one.nbytes > other.start:
            raise InvalidHeader(f"the items at bytes {one.start} and {other.start} share bytes", where=file)


def _field(value: object, kind: str, name: str) -> object:
    if not isinstance(value, Record) or value.kind != kind or value.fields is None or name not in value.fields:
        raise InvalidHeader(f"expected a {kind} with {name}", where=METADATA)
    return value.fields[name]


def _dict(value: object) -> dict[object, object]:
    if type(value) is not dict:
        raise InvalidHeader("expected a dict of tensors", where=METADATA)
    return value


def _sizes(value: object, shown: str) -> tuple[int, ...]:
    found = integers_of(value)
    if found is None or len(found) > _MOST_DIMENSIONS or not all(map(_is_count, found)):
        raise InvalidHeader(f"{shown}: an impossible shape or offset", where=METADATA)
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_NUMBER
