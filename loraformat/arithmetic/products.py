"""The products, sums and roundings that make the bytes of a merge.

Callers never see whether the compiled loop or numpy ran: both give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.arithmetic import plain
from loraformat.arithmetic.compiled import kernel
from loraformat.arithmetic.factors import Packed, pack
from loraformat.arithmetic.tally import Tally
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from loraformat.model.floats import Floats


def product(packed: Packed, start: int, stop: int) -> Floats:
    """Rows of left · right in float64, each value one chain of fused multiply-adds in the order of the rank.

    A value depends on its row and its column alone, not on `start`, `stop`, threads or the machine.

    >>> import numpy as np
    >>> packed = pack(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [0.5]]))
    >>> product(packed, 0, 2)
    array([[2.],
           [5.]])

    Args:
        start, stop: rows of the left factor.

    Returns: (stop - start, cols) float64.
    """
    compiled = kernel()
    return plain.product(packed, start, stop) if compiled is None else compiled.product(packed, start, stop)


def multiply(left: Floats, right: Floats) -> Floats:
    """The product of two matrices in the same fixed order, for products that are needed once.

    >>> import numpy as np
    >>> multiply(np.ones((2, 3)), np.ones((3, 1)))
    array([[3.],
           [3.]])
    >>> multiply(np.ones((5, 2, 3)), np.ones((5, 3, 4))).shape
    (5, 2, 4)

    Args:
        left, right: float64, (rows, rank) and (rank, cols), or stacks of as many: (n, rows, rank), (n, rank, cols).
    """
    import numpy as np

    if left.ndim == right.ndim == 2:
        return product(pack(left, right), 0, left.shape[0])
    assert left.ndim == right.ndim == 3
    found = np.empty((left.shape[0], left.shape[1], right.shape[2]))
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        found[number] = product(pack(one, other), 0, one.shape[0])
    return found


def window(
    packed: Packed, start: int, stop: int, raw: memoryview, dtype: DType, written: memoryview, out: DType
) -> list[Tally]:
    """Fill `written` with rows of W + left · right, rounded once to the nearest, ties to even.

    The bits of W stay as they are where the product is zero or W is NaN, if both dtypes are the same; -0 and what a
    NaN carries would not come through an addition.

    >>> import numpy as np
    >>> packed = pack(np.array([[0.5]]), np.array([[1.0, 2.0]]))
    >>> raw, written = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> window(packed, 0, 1, memoryview(raw).cast("B"), DType.F32, memoryview(written).cast("B"), DType.F32)
    [Tally(kept=1.25, whole=1.25, unchanged=0, numel=2, largest=1.0, error=0.0)]
    >>> written
    array([1.5, 2. ], dtype=float32)

    Args:
        packed: finite factors.
        start, stop: rows of the weight; `start` is a multiple of TILE.
        raw: the bytes of rows `start:stop` of W, row-major and little-endian.
        dtype: of `raw`; one that `takes`.
        written: as long as the result, writable; may not overlap `raw`.
        out: of `written`; one that `takes`.

    Returns: the tally of each tile of TILE rows. A value that is not finite where W is makes `kept` of its tile so.
    """
    rows, cols = stop - start, packed.cols
    assert takes(dtype, out)
    assert raw.nbytes == rows * cols * dtype.itemsize
    assert written.nbytes == rows * cols * out.itemsize
    compiled = kernel()
    if compiled is not None:
        return compiled.window(packed, start, stop, raw, dtype, written, out)
    bits, into = plain.bits_of(raw, dtype, rows, cols), plain.bits_of(written, out, rows, cols)
    return plain.window(packed, start, bits, dtype, into, out)


def finish(
    raw: memoryview, dtype: DType, result: Floats, update: Floats, written: memoryview, out: DType
) -> list[Tally]:
    """Fill `written` with `result`, rounded once to the nearest, ties to even, and tell what became of `update`.

    As for `window`, the bits of W stay where the update is zero or W is NaN, if both dtypes are the same.

    >>> import numpy as np
    >>> raw, written = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> update = np.array([[0.0, 1.0]])
    >>> finish(memoryview(raw).cast("B"), DType.F32, 1 + update, update, memoryview(written).cast("B"), DType.F32)
    [Tally(kept=1.0, whole=1.0, unchanged=1, numel=2, largest=1.0, error=0.0)]

    Args:
        raw: the bytes of W, row-major and little-endian.
        dtype: of `raw`; floating, of 16, 32 or 64 bits.
        result, update: (rows, cols) float64; W plus the update, and the update. Row 0 begins a tile.
        written: as long as the result, writable; may not overlap `raw`.
        out: of `written`; likewise.

    Returns: the tally of each tile of TILE rows.
    """
    rows, cols = result.shape
    assert update.shape == result.shape
    assert raw.nbytes == rows * cols * dtype.itemsize
    assert written.nbytes == rows * cols * out.itemsize
    compiled = kernel()
    if compiled is not None:
        return compiled.finish(raw, dtype, result, update, written, out)
    bits, into = plain.bits_of(raw, dtype, rows, cols), plain.bits_of(written, out, rows, cols)
    return plain.finish(bits, dtype, result, update, into, out)


def convert(raw: memoryview, dtype: DType, written: memoryview, out: DType) -> bool:
    """Fill `written` with the values of `raw`, rounded once to the nearest, ties to even; every NaN is the same.

    >>> import numpy as np
    >>> raw, written = np.array([1.0, 3.0]), np.zeros(2, np.float16)
    >>> single = raw.astype(np.float32)
    >>> convert(memoryview(single).cast("B"), DType.F32, memoryview(written).cast("B"), DType.F16)
    True
    >>> written
    array([1., 3.], dtype=float16)

    Args:
        raw: the bytes of some values, little-endian.
        dtype: of `raw`; one that `takes`.
        written: as many values, writable; may not overlap `raw`.
        out: of `written`; one that `takes`.

    Returns: whether all that was written is finite.
    """
    assert takes(dtype, out)
    assert raw.nbytes // dtype.itemsize == written.nbytes // out.itemsize
    compiled = kernel()
    if compiled is not None:
        return compiled.convert(raw, dtype, written, out)
    return plain.convert(raw, dtype, written, out)


def takes(*dtypes: DType) -> bool:
    """Whether `window` and `convert` read and write tensors of these dtypes: floats of 16 and 32 bits.

    >>> takes(DType.BF16, DType.F32), takes(DType.F64)
    (True, False)
    """
    return all(dtype in (DType.BF16, DType.F16, DType.F32) for dtype in dtypes)
