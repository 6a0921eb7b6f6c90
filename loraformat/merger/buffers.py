"""The memory of one worker: allocated once, used again for every window."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from loraformat.storage import PAGE_NBYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Buffers(threading.local):
    """Named runs of memory, apart in each thread; a run grows when more is asked for and is not given back."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self._is_pinned = is_pinned
        self._held: dict[str, Tensor] = {}

    def nbytes(self, name: str, nbytes: int, phase: int = 0) -> Tensor:
        """`nbytes` bytes as a uint8 tensor, from `phase` bytes into a page on; what stood in the run is lost."""
        import torch

        held = self._held.get(name)
        if held is None or held.numel() < nbytes + PAGE_NBYTES:
            held = torch.empty(nbytes + PAGE_NBYTES, dtype=torch.uint8, pin_memory=self._is_pinned)
            self._held[name] = held
        begin = (phase - held.data_ptr()) % PAGE_NBYTES
        return held[begin : begin + nbytes]

    def matrix(self, name: str, rows: int, cols: int, dtype: torch.dtype, phase: int = 0) -> Tensor:
        """A (rows, cols) matrix in the run called `name`, values undefined.

        Args:
            phase: bytes into a page at which it begins, as far as its dtype can begin there.
        """
        run = self.nbytes(name, rows * cols * dtype.itemsize, phase // dtype.itemsize * dtype.itemsize)
        return run.view(dtype).view(rows, cols)
