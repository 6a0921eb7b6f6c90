"""Windows computed on an accelerator: out and back through pinned memory, each thread on a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraformat.arithmetic import Tally
from loraformat.merger.compute.buffers import Block
from loraformat.storage import PAGE_NBYTES, address_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraformat.model.floats import Floats


class Accelerator(threading.local):
    """Computes windows of plain products on one device; on a CUDA device several threads overlap their copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._right: tuple[Floats, Tensor] | None = None

    def add(self, raw: Block, factors: tuple[Floats, Floats], start: int, written: Block) -> Tally:
        """Fill `written` with `raw` and rows of a product, summed in float64 and rounded once to the nearest.

        Args:
            raw, written: rows from `start` on; in pinned memory where the device is to read them by itself.
            factors: (rows, rank) and (rank, cols).
        """
        import torch

        with self._own_stream():
            stored = _tensor_of(raw).to(self._device, non_blocking=True)
            base = stored.to(torch.float64)
            left = torch.from_numpy(factors[0][start : start + raw.rows]).to(self._device)
            update = left @ self._on_device(factors[1])
            rounded = torch.empty_like(base, dtype=written.dtype.torch)
            round_nearest(rounded, base + update)
            if rounded.dtype == stored.dtype:  # -0, and what a NaN carries, would not come through an addition
                rounded = torch.where((update == 0) | base.isnan(), stored, rounded)
            _tensor_of(written).copy_(rounded, non_blocking=True)
            return _tally_of(rounded.to(torch.float64).sub_(base).masked_fill_(~base.isfinite(), 0), update)

    def _on_device(self, factor: Floats) -> Tensor:
        """A factor that all windows of a tensor share."""
        import torch

        if self._right is None or self._right[0] is not factor:
            self._right = (factor, torch.from_numpy(factor).to(self._device))
        return self._right[1]

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


def pinned_memory(nbytes: int) -> memoryview:
    """Memory that begins with a page, and that a CUDA device reads by itself."""
    import torch

    held = memoryview(torch.empty(nbytes + PAGE_NBYTES, dtype=torch.uint8, pin_memory=True).numpy())
    begin = -address_of(held) % PAGE_NBYTES
    return held[begin : begin + nbytes]


def round_nearest(output: Tensor, values: Tensor) -> None:
    """Fill `output` with float64 `values` rounded once, to the nearest, ties to even.

    torch goes from float64 to 16 bits by way of float32 and so rounds twice: 1 + 2^-8 + 2^-40 becomes 1 in bfloat16.
    Here the last bit of the float32 is set where it is not exact, and it is taken towards zero; what has 24 bits so
    rounds to 8 or 11 bits as the float64 does (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    import torch

    if output.dtype not in (torch.bfloat16, torch.float16):
        output.copy_(values)
        return
    near = values.to(torch.float32)
    back, bits = near.to(torch.float64), near.view(torch.int32)
    bits.sub_((back.abs() > values.abs()).to(torch.int32)).bitwise_or_((back != values).to(torch.int32))
    output.copy_(near)


def _tensor_of(block: Block) -> Tensor:
    """The memory of a block as a (rows, cols) tensor."""
    import torch

    dtype = block.dtype.torch
    if not block.data.nbytes:
        return torch.empty(block.rows, block.cols, dtype=dtype)
    return torch.frombuffer(block.data, dtype=torch.uint8).view(dtype).view(block.rows, block.cols)


def _tally_of(change: Tensor, update: Tensor) -> Tally:
    """The tally of a window: what became of the base, and what was to be added."""
    changed = int(change.count_nonzero())
    return Tally(
        kept=float((change * update).sum()),
        whole=float((update * update).sum()),
        unchanged=change.numel() - changed,
        numel=change.numel(),
        largest=float(update.abs().max()) if update.numel() else 0.0,
    )
