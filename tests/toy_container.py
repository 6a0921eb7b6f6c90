"""A toy container of weight files: a line of JSON, then tensors at multiples of 64 bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from loraformat.containers import Container
from loraformat.model.checkpoint import StoredTensor, WeightFile
from loraformat.model.tensors import DType, Entry, Span
from loraformat.storage.base import Source

MAGIC = b"TOY1"
_ALIGNMENT = 64


class ToyLayout:
    needs_checksums = False

    def __init__(self, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        sizes = {name: dtype.itemsize * _product(shape) for name, (dtype, shape) in tensors.items()}
        listed = [[name, dtype.safetensors, list(shape)] for name, (dtype, shape) in tensors.items()]
        self.header = MAGIC + json.dumps(listed).encode() + b"\n"
        self.entries: dict[str, Entry] = {}
        position = len(self.header)
        self.gaps: list[tuple[int, int]] = []
        for name, (dtype, shape) in tensors.items():
            start = -(-position // _ALIGNMENT) * _ALIGNMENT
            self.gaps.append((position, start - position))
            self.entries[name] = Entry(dtype, shape, Span(start, sizes[name]))
            position = start + sizes[name]
        self.nbytes = position

    def frame(self, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:
        del checksums
        return [(0, self.header), *((at, bytes(count)) for at, count in self.gaps if count)]


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _open(store: Source, name: str, nbytes: int) -> tuple[WeightFile, dict[str, StoredTensor]]:
    line = store.read(name).partition(b"\n")[0]
    shapes = {one: (DType[dtype], tuple(shape)) for one, dtype, shape in json.loads(line.removeprefix(MAGIC))}
    layout = ToyLayout(shapes)
    assert layout.nbytes == nbytes
    tensors = {one: StoredTensor(name, entry.dtype, entry.shape, entry.span) for one, entry in layout.entries.items()}
    return WeightFile(name, "toy", nbytes, tuple(tensors)), tensors


TOY = Container(
    name="toy",
    file_name=lambda name: name.rpartition(".")[0] + ".toy",
    index_name="model.toy.index.json",
    holds=lambda store, name: store.read(name, 0, 4) == MAGIC,
    open=_open,
    plan_file=lambda tensors, **_: ToyLayout(tensors),
    check=lambda store, name: None,
    depends_on_values=False,
    shares_storage=False,
    has_metadata=False,
)
