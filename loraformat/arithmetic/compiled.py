"""The compiled loops: which of them runs here, and calls of it without the interpreter lock.

The code is in kernel.c and loops.c and is built with the package where a compiler is there (hatch_build.py). Where it
was not, or the processor lacks fused multiply-adds, numpy gives the same bytes more slowly (plain.py).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.arithmetic.factors import COLUMNS, Narrow, Packed
from loraformat.arithmetic.tally import TILE, Tally
from loraformat.errors import require_one_of
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

VARIABLE = "LORAFORMAT_LOOP"
"""The environment variable that chooses a loop by the name that `loop` gives; for comparing machines."""

_LIBRARY = Path(__file__).with_name("_kernel.so")
_VERSION = 6  # of the functions' arguments; as in kernel.h
_FIGURES = 4  # of a tally
_TYPES = {DType.BF16: 0, DType.F16: 1, DType.F32: 2, DType.F64: 3}  # as in kernel.h
_NAMES = {512: "avx512", 256: "avx2", 128: "neon"}
_NUMPY = "numpy"


class Kernel:
    """The compiled functions for registers of `width` bits: 512 (AVX-512), 256 (AVX2) or 128 (NEON)."""

    def __init__(self, library: ctypes.CDLL, width: int) -> None:
        self.width = width
        kind, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        raw_and_written = (kind, address, kind, address, kind)
        factors, tallies = (address, size, address), (size, size, size, address)
        self._window = library.loraformat_kernel_window
        self._window.argtypes = [*raw_and_written, *factors, *tallies]
        self._window_of = library.loraformat_kernel_window_of
        self._window_of.argtypes = [*raw_and_written, *factors, address, address, address, kind, *tallies]
        self._narrow = library.loraformat_kernel_narrow
        self._narrow.argtypes = [kind, address, size, size, address, address, address]
        self._narrows = library.loraformat_kernel_narrows
        self._narrows.argtypes = [size, kind]
        self._product = library.loraformat_kernel_product
        self._product.argtypes = [kind, *factors, size, size, address]
        self._finish = library.loraformat_kernel_finish
        self._finish.argtypes = [*raw_and_written, address, address, *tallies]
        self._convert = library.loraformat_kernel_convert
        self._convert.argtypes = [kind, address, kind, address, kind, size]
        self._decode = library.loraformat_kernel_decode
        self._decode.argtypes = [
            *(kind, address, size, size, kind, kind, size, size, address, address, address),
            *(size, size, size, address, ctypes.c_float, kind, address, kind),
        ]
        for function in (self._window, self._window_of, self._product, self._finish):
            function.restype = None

    def product(self, packed: Packed, start: int, stop: int) -> Floats:
        """See `products.product`."""
        import numpy as np

        left, found = packed.left[start:stop], np.empty((stop - start, packed.cols))
        self._product(
            *(self.width, left.ctypes.data, packed.rank, packed.right.ctypes.data),
            *(stop - start, packed.cols, found.ctypes.data),
        )
        return found

    def window(
        self, packed: Packed, start: int, stop: int, raw: memoryview, dtype: DType, written: memoryview, out: DType
    ) -> list[Tally]:
        """See `products.window`."""
        import numpy as np

        rows, cols, left = stop - start, packed.cols, packed.left[start:stop]
        figures = np.empty((-(-rows // TILE), _FIGURES))
        narrow = packed.narrow(self._made_narrow) if self._narrows(packed.rank, _TYPES[out]) else None
        self._window_of(
            *(self.width, _address(raw), _TYPES[dtype], _address(written), _TYPES[out]),
            *(left.ctypes.data, packed.rank, packed.right.ctypes.data, *_narrow_arguments(narrow)),
            *(rows, cols, TILE, figures.ctypes.data),
        )
        return _tallies(figures.tolist(), rows, cols)

    def convert(self, raw: memoryview, dtype: DType, written: memoryview, out: DType) -> bool:
        """See `products.convert`."""
        count = raw.nbytes // dtype.itemsize
        return bool(self._convert(self.width, _address(raw), _TYPES[dtype], _address(written), _TYPES[out], count))

    def decode(self, *arguments: float | None, out: DType) -> bool:
        """`loraformat_kernel_decode` of kernel.c, whose first argument is the width; see `codes.decode`."""
        return bool(self._decode(self.width, *arguments, _TYPES[out]))

    def _made_narrow(self, packed: Packed) -> Narrow:
        import numpy as np

        right, rank = np.empty(packed.right.shape, np.float32), packed.rank
        bound, squares = np.empty((len(right), COLUMNS), np.float32), np.empty(rank * COLUMNS)
        is_exact = self._narrow(
            *(self.width, packed.right.ctypes.data, rank, packed.cols),
            *(right.ctypes.data, bound.ctypes.data, squares.ctypes.data),
        )
        return Narrow(right, bound, squares[:rank].copy(), bool(is_exact))

    def finish(
        self, raw: memoryview, dtype: DType, result: Floats, update: Floats, written: memoryview, out: DType
    ) -> list[Tally]:
        """See `products.finish`."""
        import numpy as np

        rows, cols = result.shape
        result, update = np.ascontiguousarray(result), np.ascontiguousarray(update)
        figures = np.empty((-(-rows // TILE), _FIGURES))
        self._finish(
            *(self.width, _address(raw), _TYPES[dtype], _address(written), _TYPES[out]),
            *(result.ctypes.data, update.ctypes.data, rows, cols, TILE, figures.ctypes.data),
        )
        return _tallies(figures.tolist(), rows, cols)


def loop() -> str:
    """The loop that computes merges here: "avx512", "avx2", "neon", or "numpy" where none is compiled.

    >>> loop() in ("avx512", "avx2", "neon", "numpy")
    True

    Raises: UsageError (LF021): LORAFORMAT_LOOP names one that this machine does not have.
    """
    found = kernel()
    return _NUMPY if found is None else _NAMES[found.width]


def kernel() -> Kernel | None:
    """The compiled loop, or None where numpy computes.

    Raises: UsageError (LF021): LORAFORMAT_LOOP names one that this machine does not have.
    """
    asked, kernels = os.environ.get(VARIABLE, ""), _kernels()
    if not asked:
        return next(iter(kernels.values()), None)
    require_one_of(asked, (*kernels, _NUMPY), VARIABLE)
    return kernels.get(asked)


def open_kernel() -> Kernel | None:
    """The widest compiled loop that this processor runs; None where there is none."""
    return next(iter(_kernels().values()), None)


@cache
def _kernels() -> dict[str, Kernel]:
    """Every compiled loop that this processor runs, by name, the widest first; none of a library that is not ours."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        if library.loraformat_kernel_version() != _VERSION:
            return {}
        widest = int(library.loraformat_kernel_width())
        narrower = (256,) if widest == 512 else ()
        return {_NAMES[width]: Kernel(library, width) for width in (widest, *narrower) if width}
    except (OSError, AttributeError):
        return {}


def _address(data: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(data, np.uint8).ctypes.data) if data.nbytes else 0


def _narrow_arguments(narrow: Narrow | None) -> tuple[int | None, int | None, int | None, int]:
    if narrow is None:
        return None, None, None, 0
    return narrow.right.ctypes.data, narrow.bound.ctypes.data, narrow.squares.ctypes.data, int(narrow.is_exact)


def _tallies(figures: list[list[float]], rows: int, cols: int) -> list[Tally]:
    heights = [min(TILE, rows - low) for low in range(0, rows, TILE)]
    return [
        Tally(kept, whole, height * cols - int(changed), height * cols, largest)
        for height, (kept, whole, changed, largest) in zip(heights, figures, strict=True)
    ]
