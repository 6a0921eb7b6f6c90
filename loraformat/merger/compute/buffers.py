"""The memory of one worker: allocated once, used again for every window."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.model.tensors import DType
from loraformat.storage import PAGE_NBYTES, address_of, memory_at

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """A matrix in writable memory, row-major without gaps, as it stands in a file."""

    data: memoryview
    dtype: DType
    rows: int
    cols: int

    @property
    def address(self) -> int:
        """Where it begins; 0 where it has no elements."""
        return address_of(self.data) if self.data.nbytes else 0

    def tensor(self) -> Tensor:
        """The same memory as a (rows, cols) torch tensor."""
        return _seen_as(self.data, self.rows, self.cols, self.dtype.torch)


class Buffers(threading.local):
    """Named runs of memory, apart in each thread; a run grows when more is asked for and is not given back."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self._is_pinned = is_pinned
        self._held: dict[str, memoryview] = {}

    def block(self, name: str, rows: int, cols: int, dtype: DType, phase: int = 0) -> Block:
        """A matrix in the run called `name`, values undefined.

        Args:
            phase: bytes into a page at which it begins, as far as its dtype can begin there.
        """
        begin = phase // dtype.itemsize * dtype.itemsize
        return Block(self._run(name, rows * cols * dtype.itemsize, begin), dtype, rows, cols)

    def matrix(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A (rows, cols) torch tensor in the run called `name`, values undefined."""
        return _seen_as(self._run(name, rows * cols * dtype.itemsize), rows, cols, dtype)

    def _run(self, name: str, nbytes: int, phase: int = 0) -> memoryview:
        held = self._held.get(name)
        if held is None or held.nbytes < nbytes + PAGE_NBYTES:
            # The old run goes first: two at a time would be more than was asked for.
            self._held.pop(name, None)
            held = _pinned(nbytes + PAGE_NBYTES) if self._is_pinned else memory_at(0, nbytes + PAGE_NBYTES)
            self._held[name] = held
        return held[phase : phase + nbytes]


def _seen_as(data: memoryview, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    import torch

    if not data.nbytes:
        return torch.empty(rows, cols, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(rows, cols)


def _pinned(nbytes: int) -> memoryview:
    """Memory that begins with a page, and that a CUDA device reads by itself."""
    import torch

    held = memoryview(torch.empty(nbytes + PAGE_NBYTES, dtype=torch.uint8, pin_memory=True).numpy())
    begin = -address_of(held) % PAGE_NBYTES
    return held[begin : begin + nbytes]
