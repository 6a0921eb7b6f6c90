"""Windows of plain products in compiled code: one pass, no interpreter lock, the same bytes on every x86-64 processor.

The code is in kernel.c and is built with the package where gcc is there. Where it was not, or the processor lacks AVX2,
torch computes the same windows in several passes; a float64 sum may then differ in its last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.merger.apply import TILE, Product
from loraformat.merger.retention import Tally

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIBRARY = Path(__file__).with_name("_kernel.so")
_VERSION = 2  # of the functions' arguments; as in kernel.c
_COLS = 16  # columns that are computed together; as in kernel.c
_FIGURES = 4  # of a tally


@dataclass(frozen=True, slots=True)
class Packed:
    """The sum of several products as one, laid out for the kernel.

    Attributes:
        left: (rows, rank) float64, rank the sum of all ranks.
        right: (blocks, rank, 16) float64: columns in blocks of 16, the last filled up with zeros.
        cols: columns of the product.
    """

    left: Tensor
    right: Tensor
    cols: int


def pack(products: Sequence[Product]) -> Packed:
    """Factors made ready once for all windows of a weight."""
    import torch

    left = torch.cat([product.left for product in products], dim=1).to(torch.float64).contiguous()
    right = torch.cat([product.right for product in products]).to(torch.float64)
    rank, cols = right.shape
    blocks = -(-cols // _COLS)
    filled = torch.nn.functional.pad(right, (0, blocks * _COLS - cols))
    return Packed(left, filled.view(rank, blocks, _COLS).transpose(0, 1).contiguous(), cols)


class Kernel:
    """The compiled functions, for registers of `width` bits: 512 or 256."""

    def __init__(self, library: ctypes.CDLL, width: int) -> None:
        self.width = width
        self._window = library.loraformat_kernel_window
        address, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._window.restype = None
        self._window.argtypes = [
            *(number, address, number, address, number, address, size, address),
            *(size, size, size, address),
        ]

    def takes(self, *dtypes: torch.dtype) -> bool:
        """Whether it reads and writes tensors of these dtypes."""
        return all(dtype in _types() for dtype in dtypes)

    def window(self, raw: Tensor, products: Packed, start: int, written: Tensor) -> list[Tally]:
        """Fill `written` with `raw` plus rows of all products, summed in float64 and rounded once to the nearest.

        Args:
            raw, written: (rows, cols), rows from `start` on, a multiple of TILE; contiguous, of dtypes that it takes.

        Returns: the tally of each tile.
        """
        import torch

        rows, cols = raw.shape
        assert cols == products.cols
        assert raw.is_contiguous()
        assert written.is_contiguous()
        types, left = _types(), products.left[start : start + rows]
        figures = torch.empty(-(-rows // TILE), _FIGURES, dtype=torch.float64)
        self._window(
            *(self.width, raw.data_ptr(), types[raw.dtype], written.data_ptr(), types[written.dtype]),
            *(left.data_ptr(), left.shape[1], products.right.data_ptr()),
            *(rows, cols, TILE, figures.data_ptr()),
        )
        heights = [min(TILE, rows - low) for low in range(0, rows, TILE)]
        return [
            Tally(kept, whole, height * cols - int(changed), height * cols, largest)
            for height, (kept, whole, changed, largest) in zip(heights, figures.tolist(), strict=True)
        ]


@cache
def open_kernel() -> Kernel | None:
    """The kernel; None where it was not built, is of another version, or this processor cannot run it."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:
        return None
    if library.loraformat_kernel_version() != _VERSION:
        return None
    width = int(library.loraformat_kernel_width())
    return Kernel(library, width) if width else None


@cache
def _types() -> dict[torch.dtype, int]:
    import torch

    return {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
