"""Packed codes with their scales, and their conversion to numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.arithmetic.codes.plain import ACROSS, HIGH_FIRST, LOW_FIRST, unpacked
from loraformat.arithmetic.compiled import Kernel, kernel
from loraformat.arithmetic.products import convert
from loraformat.model.tensors import DType, bytes_of

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Singles: TypeAlias = NDArray[np.float32]

# As in kernel.h.
_ORDERS = {LOW_FIRST: 0, HIGH_FIRST: 1, ACROSS: 2}
_WORD_NBYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Rows of codes. A number is f32(f32(f32(table[code] - zero) · scale) · factor); each difference must be exact.

    Attributes:
        packed: (rows, bytes) uint8, the bytes of a row one after the other, or (rows, words) int32, where rows and
            words may lie apart. The codes of a row begin with its first bit. For ACROSS (cols, rows / 8) int32: a word
            holds the codes of eight rows in one column.
        cols: codes of a row that are decoded.
        bits: 2, 3, 4 or 8; 4 for HIGH_FIRST and ACROSS.
        order: LOW_FIRST: code i takes bits [i·bits, (i + 1)·bits) of its row, lowest bit first; HIGH_FIRST: the other
            half of a byte comes first; ACROSS: row k of eight has nibble (0, 4, 1, 5, 2, 6, 3, 7)[k] of a word.
        table: float32, what each code means before its scale: 2^bits numbers.
        scales: (rows, groups) float32.
        run: columns that share a scale, one group after the other.
        first: the place of the first column in its group.
        index: the group of each column, int32, where groups are not runs; each less than the number of groups. Not for
            ACROSS.
        zeros: (rows, groups) float32; None for zero.
        factor: float32, by which all are multiplied last.
    """

    packed: NDArray[Any]
    cols: int
    bits: int
    table: Singles
    scales: Singles
    run: int
    order: str = LOW_FIRST
    first: int = 0
    index: NDArray[np.int32] | None = None
    zeros: Singles | None = None
    factor: float = 1.0

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.scales)


def decode(codes: Codes, *, transposed: bool = False) -> Singles:
    """The numbers of codes, each with the roundings to float32 that `Codes` states.

    >>> import numpy as np
    >>> table, scales = np.arange(16, dtype=np.float32), np.array([[0.5], [2.0]], np.float32)
    >>> packed = np.array([[0x21], [0x43]], np.uint8)
    >>> decode(Codes(packed=packed, cols=2, bits=4, table=table, scales=scales, run=2))
    array([[0.5, 1. ],
           [6. , 8. ]], dtype=float32)

    Returns: float32, (rows, cols), or if `transposed` (cols, rows), in memory of its own.
    """
    import numpy as np

    compiled = kernel()
    if compiled is None:
        found = _by_numpy(codes)
        return found.T.copy() if transposed else found
    if transposed and codes.order == ACROSS:  # the loop fills whole rows of such codes
        across: Singles = np.ascontiguousarray(decode(codes).T)
        return across
    found = np.empty((codes.cols, codes.rows) if transposed else (codes.rows, codes.cols), np.float32)
    _compiled(compiled, codes, found.ctypes.data, DType.F32, transposed=transposed)
    return found


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a matrix that are still codes.

    Attributes:
        codes: of the matrix, or if `is_transposed` of its transpose.
    """

    codes: Codes
    is_transposed: bool = False

    def numbers(self) -> Singles:
        """See `decode`."""
        return decode(self.codes, transposed=self.is_transposed)

    def round_into(self, written: memoryview, dtype: DType) -> bool:
        """Fill `written` with the numbers, row-major, each rounded once more: to a dtype of 16 bits.

        As `decode` and then `convert`, without the numbers of float32 in memory. Returns: whether all are finite.
        """
        import numpy as np

        if dtype.itemsize != 2 or written.readonly:
            raise ValueError(f"expected memory for numbers of 16 bits that can be written, found {dtype.safetensors}")
        if written.nbytes != self.codes.rows * self.codes.cols * dtype.itemsize:
            raise ValueError(
                f"expected room for {self.codes.rows} x {self.codes.cols} numbers, found {written.nbytes} bytes"
            )
        compiled = kernel()
        if compiled is None or (self.is_transposed and self.codes.order == ACROSS):
            return convert(bytes_of(self.numbers(), DType.F32), DType.F32, written, dtype)
        into = np.frombuffer(written, np.uint8)
        return _compiled(compiled, self.codes, into.ctypes.data, dtype, transposed=self.is_transposed)


def _compiled(compiled: Kernel, codes: Codes, address: int, dtype: DType, *, transposed: bool) -> bool:
    """Write the numbers to an address; whether all are finite, where they are rounded to 16 bits."""
    import numpy as np

    rows, cols, packed = codes.rows, codes.cols, codes.packed
    scales, zeros = _contiguous(codes.scales), None if codes.zeros is None else _contiguous(codes.zeros)
    table = np.zeros(max(16, len(codes.table)), np.float32)
    table[: len(codes.table)] = codes.table
    index = None if codes.index is None else np.ascontiguousarray(codes.index, np.int32)
    row_step, word_step = packed.strides
    if codes.order == ACROSS:
        row_step, word_step = 0, row_step
    elif packed.itemsize == 1:
        word_step = _WORD_NBYTES
    if not (rows and cols):
        return True
    return compiled.decode(
        *(packed.ctypes.data, row_step, word_step, codes.bits, _ORDERS[codes.order], rows, cols),
        *(table.ctypes.data, scales.ctypes.data, None if zeros is None else zeros.ctypes.data),
        *(scales.shape[1], codes.run, codes.first, None if index is None else index.ctypes.data),
        *(float(np.float32(codes.factor)), int(transposed), address),
        out=dtype,
    )


def _contiguous(values: Singles) -> Singles:
    import numpy as np

    return np.ascontiguousarray(values, np.float32)


def _by_numpy(codes: Codes) -> Singles:
    import numpy as np

    index = codes.index
    groups = (codes.first + np.arange(codes.cols)) // codes.run if index is None else index
    with np.errstate(all="ignore"):
        values = codes.table[unpacked(codes.packed, codes.bits, codes.cols, codes.order)]
        if codes.zeros is not None:
            values -= codes.zeros[:, groups]
        values *= codes.scales[:, groups]
        values *= np.float32(codes.factor)
    return np.asarray(values, np.float32)
