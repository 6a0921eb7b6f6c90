"""CRC-32 of bytes that arrive in pieces, in any order."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32 as in zip, lowest bit first
_Matrix = tuple[int, ...]


def combine_crc32(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two runs of bytes one after the other.

    Args:
        first: CRC-32 of the first run.
        second: CRC-32 of the second run, which is `second_nbytes` long.

    Appending a zero byte to a message is a linear map of its CRC over GF(2), so appending n of them is the n-th power
    of one matrix; that, applied to the first CRC, is added to the second.
    Source: the method that zlib documents for `crc32_combine`.
    """
    return _apply(_append_zeros(second_nbytes), first) ^ second


@lru_cache(maxsize=256)
def _append_zeros(nbytes: int) -> _Matrix:
    """Column n: what `nbytes` zero bytes make of a CRC whose only bit is n."""
    result: _Matrix = tuple(1 << bit for bit in range(32))
    power = _zero_byte()
    while nbytes:
        if nbytes & 1:
            result = _product(power, result)
        power = _product(power, power)
        nbytes >>= 1
    return result


def _zero_byte() -> _Matrix:
    one_bit: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))
    for _ in range(3):
        one_bit = _product(one_bit, one_bit)
    return one_bit


def _product(left: _Matrix, right: _Matrix) -> _Matrix:
    return tuple(_apply(left, column) for column in right)


def _apply(matrix: _Matrix, vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
