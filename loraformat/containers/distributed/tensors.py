"""The tensors of a torch.distributed checkpoint, assembled from their shards on demand.

Source: torch 2.13.0, distributed/checkpoint/filesystem.py `_write_item`: an item is what
torch.save makes of one tensor.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from loraformat.containers.distributed.metadata import METADATA, SUFFIX, Contents, Shard, ShardedTensor, read_contents
from loraformat.containers.torch_zip import lazy_tensor
from loraformat.diagnostics import show
from loraformat.errors import ContainerError, InvalidHeader
from loraformat.model.bundle import Tensors
from loraformat.model.tensors import LazyTensor
from loraformat.storage import MemberStore
from loraformat.storage.base import Source

if TYPE_CHECKING:
    from loraformat.model.tensors import Values

_MOST_NBYTES = 64 << 20


def open_distributed(store: Source) -> Tensors:
    """The tensors of a folder; other objects, and files of shards that nothing names, are listed in `extras`.

    Raises: ContainerError and its subclasses (see `read_contents`), StorageError.
    """
    files = store.files()
    if files[METADATA] > _MOST_NBYTES:
        text = f"{files[METADATA]} bytes of metadata, at most {_MOST_NBYTES} are read"
        raise InvalidHeader(text, where=METADATA)
    store.check_inside(METADATA)
    contents = read_contents(store.read(METADATA), files)
    members = MemberStore(store, _members(contents))
    entries = {name: _lazy(name, tensor, members) for name, tensor in contents.tensors.items()}
    unnamed = [name for name in files if name.endswith(SUFFIX) and name not in contents.files]
    extras = {
        **dict.fromkeys(contents.objects, "an object that is not a tensor"),
        **dict.fromkeys(unnamed, "a file that .metadata does not name"),
    }
    return Tensors("distcp", entries, extras=extras)


def _members(contents: Contents) -> dict[str, tuple[str, int, int]]:
    return {
        _member(shard): (shard.file, shard.start, shard.nbytes)
        for tensor in contents.tensors.values()
        for shard in tensor.shards
    }


def _member(shard: Shard) -> str:
    return f"{shard.file}@{shard.start}"


def _lazy(name: str, tensor: ShardedTensor, members: MemberStore) -> LazyTensor:
    @cache
    def opened(shard: Shard) -> LazyTensor:
        """The shard, whose own header must say what `.metadata` says."""
        members.check_inside(_member(shard))
        found = lazy_tensor(members, _member(shard))
        if found.shape != shard.shape or found.dtype is not tensor.dtype:
            stated = f"{tensor.dtype.safetensors} {list(shard.shape)}"
            text = f"{show(name, 200)}: .metadata says {stated}, the item is {found.dtype.safetensors}"
            raise ContainerError(f"{text} {list(found.shape)}", where=_member(shard))
        return found

    def read(start: int, stop: int) -> Values:
        import numpy as np

        if not tensor.shape:
            return opened(tensor.shards[0]).read(start, stop)
        whole = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype.numpy)
        for shard in tensor.shards:
            first, last = max(start, shard.offsets[0]), min(stop, shard.offsets[0] + shard.shape[0])
            if first < last:
                rows = opened(shard).read(first - shard.offsets[0], last - shard.offsets[0])
                across = tuple(
                    slice(at, at + size) for at, size in zip(shard.offsets[1:], shard.shape[1:], strict=True)
                )
                place = (slice(first - start, last - start), *across)
                whole[place] = rows
        return whole

    return LazyTensor(tensor.shape, tensor.dtype, read)
