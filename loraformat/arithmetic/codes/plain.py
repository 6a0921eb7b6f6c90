"""Codes of a few bits out of the bytes and words that hold them, in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

LOW_FIRST, HIGH_FIRST, ACROSS = "low first", "high first", "across"
# The nibble of a word, lowest first, that holds the code of each of its eight rows.
# Source: autoawq 0.2.6, utils/packing_utils.py `AWQ_REVERSE_ORDER`.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpacked(packed: NDArray[Any], bits: int, cols: int, order: str = LOW_FIRST) -> NDArray[np.uint8]:
    """The codes of each row, (rows, cols); see `Codes` for the arguments.

    >>> import numpy as np
    >>> unpacked(np.array([[0x21]], np.uint8), 4, 2)
    array([[1, 2]], dtype=uint8)
    """
    import numpy as np

    if order == ACROSS:
        shifts = np.array(_NIBBLES, np.uint32) * 4
        fields = (np.ascontiguousarray(packed).view(np.uint32)[:cols, :, None] >> shifts) & 15
        return np.asarray(fields.reshape(cols, packed.shape[1] * 8).T, np.uint8)
    raw = packed
    if packed.itemsize > 1:
        raw = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return np.asarray(raw[:, :cols], np.uint8)
    if bits == 3:
        loose = np.unpackbits(raw, axis=-1, bitorder="little")[:, : cols * 3].reshape(len(raw), cols, 3)
        return np.asarray(loose[..., 0] | loose[..., 1] << 1 | loose[..., 2] << 2, np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (raw[:, :, None] >> (shifts[::-1] if order == HIGH_FIRST else shifts)) & ((1 << bits) - 1)
    return np.asarray(fields.reshape(len(raw), raw.shape[1] * 8 // bits)[:, :cols], np.uint8)
