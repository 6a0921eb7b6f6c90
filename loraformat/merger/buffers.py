"""The memory of one worker: allocated once, used again for every window."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Buffers(threading.local):
    """Named runs of memory, apart in each thread; a run grows when more is asked for and is not given back."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self._is_pinned = is_pinned
        self._held: dict[str, Tensor] = {}

    def nbytes(self, name: str, nbytes: int) -> Tensor:
        """`nbytes` bytes as a uint8 tensor; what stood in the run called `name` is lost."""
        import torch

        held = self._held.get(name)
        if held is None or held.numel() < nbytes:
            held = self._held[name] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        return held[:nbytes]

    def matrix(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A (rows, cols) matrix in the run called `name`, values undefined."""
        return self.nbytes(name, rows * cols * dtype.itemsize).view(dtype).view(rows, cols)
