"""Checkpoints written by torch.distributed.checkpoint itself, in one process: whole tensors, and tensors in shards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from typing_extensions import Self


class Sharded(torch.Tensor):
    """A tensor that is saved in blocks, by the protocol that Megatron-Core's own class satisfies.

    Source: Megatron-LM d98e8a6, core/dist_checkpointing/strategies/checkpointable.py.
    """

    @staticmethod
    def __new__(cls, value: Tensor, cuts: tuple[tuple[int, ...], ...]) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape)

    def __init__(self, value: Tensor, cuts: tuple[tuple[int, ...], ...]) -> None:
        self.value, self.cuts = value, cuts

    def blocks(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offsets, sizes) of every block."""
        runs = [
            [(first, after - first) for first, after in pairwise([0, *cut, size])]
            for cut, size in zip(self.cuts, self.value.shape, strict=True)
        ]
        return [(tuple(at for at, _ in cell), tuple(size for _, size in cell)) for cell in product(*runs)]

    def __create_write_items__(self, fqn: str, value: Sharded) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.value)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets), number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=properties,
                    size=self.value.shape,
                ),
            )
            for number, (offsets, sizes) in enumerate(self.blocks())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.blocks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        sizes = dict(self.blocks())[tuple(index.offset)]
        place = tuple(slice(at, at + size) for at, size in zip(index.offset, sizes, strict=True))
        return self.value[place].clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: only saving is expected of a tensor that stands for its shards")


def save(folder: Path, values: Mapping[str, Any], *, files: int = 1) -> Path:
    """`.metadata` and so many `.distcp` files."""
    writer = checkpoint.FileSystemWriter(folder, thread_count=files, sync_files=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(dict(values), storage_writer=writer, no_dist=True)
    return folder
