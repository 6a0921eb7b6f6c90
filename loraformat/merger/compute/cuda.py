"""Windows computed on an accelerator: out and back through pinned memory, each thread on a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraformat.arithmetic import Tally
from loraformat.merger.compute.kinds.steps import Product
from loraformat.merger.compute.retention import change_of, tally_of
from loraformat.merger.compute.rounding import keep_unchanged, round_nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Accelerator(threading.local):
    """Computes windows of plain products on one device; on a CUDA device several threads overlap their copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._factors: list[tuple[Tensor, Tensor]] = []

    def add(self, raw: Tensor, products: Sequence[Product], start: int, written: Tensor, dtype: torch.dtype) -> Tally:
        """Fill `written` with `raw` and rows of all products, summed in `dtype` and rounded once to the nearest.

        Args:
            raw, written: rows from `start` on, on the CPU; pinned where the device is to read them by itself.
        """
        import torch

        with self._own_stream():
            stored = raw.to(self._device, non_blocking=True)
            base = stored.to(dtype)
            update = torch.zeros_like(base)
            for number, product in enumerate(products):
                left = product.left[start : start + len(raw)].to(self._device)
                update.addmm_(left, self._right(number, product.right))
            rounded = torch.empty_like(base, dtype=written.dtype)
            round_nearest(rounded, base + update)
            keep_unchanged(rounded, stored, base, update)
            written.copy_(rounded, non_blocking=True)
            return tally_of(change_of(rounded, base, torch.empty_like(base)), update)

    def _right(self, number: int, factor: Tensor) -> Tensor:
        """A factor that all windows of a tensor share, on the device."""
        if number >= len(self._factors) or self._factors[number][0] is not factor:
            self._factors[number:] = [(factor, factor.to(self._device))]
        return self._factors[number][1]

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A block whose work goes to this thread's stream, and is done at its end."""
        import torch

        if self._device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
