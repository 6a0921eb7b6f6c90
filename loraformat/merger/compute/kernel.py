"""Windows of plain products in compiled code: one pass, no interpreter lock, the same bytes on every x86-64 processor.

The code is in kernel.c and is built with the package where gcc is there. Where it was not, or the processor lacks AVX2,
torch computes the same windows in several passes; a float64 sum may then differ in its last bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.merger.compute.apply import TILE
from loraformat.merger.compute.buffers import Block
from loraformat.merger.compute.retention import Tally
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_LIBRARY = Path(__file__).with_name("_kernel.so")
_VERSION = 2  # of the functions' arguments; as in kernel.c
_COLS = 16  # columns that are computed together; as in kernel.c
_FIGURES = 4  # of a tally
_TYPES = {DType.BF16: 0, DType.F16: 1, DType.F32: 2}  # as in kernel.c


@dataclass(frozen=True, slots=True)
class Packed:
    """The sum of several products as one, laid out for the kernel.

    Attributes:
        left: (rows, rank) float64, rank the sum of all ranks.
        right: (blocks, rank, 16) float64: columns in blocks of 16, the last filled up with zeros.
        cols: columns of the product.
    """

    left: Floats
    right: Floats
    cols: int


def pack(left: Floats, right: Floats) -> Packed:
    """Factors, (rows, rank) and (rank, cols), made ready once for all windows of a weight."""
    import numpy as np

    rank, cols = right.shape
    blocks = -(-cols // _COLS)
    filled = np.zeros((rank, blocks * _COLS))
    filled[:, :cols] = right
    packed = filled.reshape(rank, blocks, _COLS).transpose(1, 0, 2)
    return Packed(np.ascontiguousarray(left), np.ascontiguousarray(packed), cols)


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

    def takes(self, *dtypes: DType) -> bool:
        """Whether it reads and writes tensors of these dtypes."""
        return all(dtype in _TYPES for dtype in dtypes)

    def window(self, raw: Block, products: Packed, start: int, written: Block) -> list[Tally]:
        """Fill `written` with `raw` plus rows of all products, summed in float64 and rounded once to the nearest.

        Args:
            raw, written: rows from `start` on, a multiple of TILE; of dtypes that it takes.

        Returns: the tally of each tile.
        """
        import numpy as np

        rows, cols = raw.rows, products.cols
        left = products.left[start : start + rows]
        assert (rows, cols) == (raw.rows, raw.cols) == (written.rows, written.cols) == (len(left), cols)
        figures = np.empty((-(-rows // TILE), _FIGURES))
        self._window(
            *(self.width, raw.address, _TYPES[raw.dtype], written.address, _TYPES[written.dtype]),
            *(left.ctypes.data, left.shape[1], products.right.ctypes.data),
            *(rows, cols, TILE, figures.ctypes.data),
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
