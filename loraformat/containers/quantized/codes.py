"""Codes of a few bits as numbers: nibbles, streams of bits, and the FP4 values of MXFP4 and NVFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.model.tensors import DType, numbers_of

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

# E2M1 by its code; bit 3 is the sign, and code 8 is -0.
# Source: OCP Microscaling Formats 1.0, table 5.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def low_nibble_first(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(…, n) bytes as (…, 2n) codes of four bits; the low half of a byte comes first."""
    return _nibbles(packed, 0, 4)


def high_nibble_first(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(…, n) bytes as (…, 2n) codes of four bits; the high half of a byte comes first."""
    return _nibbles(packed, 4, 0)


def _nibbles(packed: NDArray[np.uint8], first: int, second: int) -> NDArray[np.uint8]:
    import numpy as np

    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = (packed >> first) & 15, (packed >> second) & 15
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def from_stream(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """Codes out of 32-bit words along an axis, as many as fit into all of them together.

    Code i takes bits [i·bits, (i+1)·bits) of the words in their order, lowest bit first; for 3 bits it may lie in two.

    Args:
        bits: 2, 3, 4 or 8.

    Returns: along the axis all codes that the words hold, those of a last word that is not full too.
    """
    import numpy as np

    lines = np.moveaxis(words, axis, -1)
    raw = np.ascontiguousarray(lines).astype("<i4", copy=False).view(np.uint8)
    codes: NDArray[Any]
    if bits == 8:
        codes = raw
    elif bits in (2, 4):
        each = np.arange(0, 8, bits, dtype=np.uint8)
        codes = ((raw[..., None] >> each) & ((1 << bits) - 1)).reshape(*raw.shape[:-1], raw.shape[-1] * 8 // bits)
    else:
        loose = np.unpackbits(raw, axis=-1, bitorder="little")
        count = loose.shape[-1] // bits
        loose = loose[..., : count * bits].reshape(*raw.shape[:-1], count, bits)
        codes = np.asarray((loose << np.arange(bits, dtype=np.uint8)).sum(axis=-1), np.uint8)
    return np.asarray(np.moveaxis(np.asarray(codes, np.uint8), -1, axis))


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes as E8M0 means them: 2^(e - 127), and NaN for 255."""
    import numpy as np

    return np.asarray(numbers_of(bytearray(exponents.tobytes()), DType.F8_E8M0).reshape(exponents.shape), np.float32)


def fp4_table() -> NDArray[np.float32]:
    """The 16 values of FP4 by code."""
    import numpy as np

    return np.array(FP4, np.float32)
