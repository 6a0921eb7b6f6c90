"""From blocks of GGUF to float32: exactly the values that the gguf package computes.

A function takes blocks as bytes (blocks, bytes) and gives values (blocks, elements). Products and sums are made in
float32 and in the order of the source, since each of them rounds.

Source: gguf 0.19.0, quants.py; llama.cpp of llama_cpp_python 0.3.36, ggml/src/ggml-common.h for the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Blocks: TypeAlias = NDArray[np.uint8]
    Singles: TypeAlias = NDArray[np.float32]

# Where the float16 scales of a block stand.
_SCALES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ2_0": (64,),
}
_CHUNK_ELEMENTS = 1 << 18  # of what is decoded at a time: the steps between stay in the cache of a processor
# Source: gguf 0.19.0, quants.py `IQ4_NL.kvalues`, `MXFP4.kvalues`.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def decode(kind: str, data: Blocks, elements: int) -> Singles:
    """All elements of blocks.

    Args:
        kind: a key of DECODERS.
        data: (blocks, bytes of a block).
        elements: of a block.
    """
    import numpy as np

    found = np.empty((len(data), elements), np.float32)
    step = max(1, _CHUNK_ELEMENTS // elements)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is the caller's to judge
        for start in range(0, len(data), step):
            found[start : start + step] = DECODERS[kind](data[start : start + step])
    return found


def are_finite(kind: str, data: Blocks, values: Singles) -> bool:
    """Whether decoded values are all numbers: by the float16 scales of the blocks, of which there are few, where those
    tell. The largest of them times the largest codes is far from the largest float32.
    """
    import numpy as np

    places = _SCALES.get(kind)
    if places is None:
        return bool(np.isfinite(values).all())
    return all(((data[:, at + 1] & np.uint8(0x7C)) != np.uint8(0x7C)).all() for at in places)


def _half(data: Blocks, at: int) -> Singles:
    """(blocks, 1): the float16 at a place of each block."""
    import numpy as np

    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(data: Blocks, width: int, bits: int) -> Blocks:
    """Numbers of `bits` bits: the lowest of `width` bytes come first, then the next higher ones, then further bytes."""
    import numpy as np

    groups = data.reshape(len(data), -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    return np.asarray(((groups >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(data), -1))


def _each_bit(data: Blocks) -> Blocks:
    """Bit after bit of byte after byte, the lowest first."""
    import numpy as np

    return np.unpackbits(data, axis=1, bitorder="little")


def _q4_0(data: Blocks) -> Singles:
    import numpy as np

    return np.asarray(_half(data, 0) * (_fields(data[:, 2:], 16, 4).astype(np.float32) - np.float32(8)))


def _q4_1(data: Blocks) -> Singles:
    import numpy as np

    return _half(data, 0) * _fields(data[:, 4:], 16, 4).astype(np.float32) + _half(data, 2)


def _q5_0(data: Blocks) -> Singles:
    import numpy as np

    codes = _fields(data[:, 6:], 16, 4) | _each_bit(data[:, 2:6]) << np.uint8(4)
    return np.asarray(_half(data, 0) * (codes.astype(np.float32) - np.float32(16)))


def _q5_1(data: Blocks) -> Singles:
    import numpy as np

    codes = _fields(data[:, 8:], 16, 4) | _each_bit(data[:, 4:8]) << np.uint8(4)
    return np.asarray(_half(data, 0) * codes.astype(np.float32) + _half(data, 2))


def _q8_0(data: Blocks) -> Singles:
    import numpy as np

    return _half(data, 0) * data[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(data: Blocks) -> Singles:
    import numpy as np

    scales = data[:, :16]
    high = _half(data, 80) * (scales & np.uint8(15)).astype(np.float32)
    low = _half(data, 82) * (scales >> np.uint8(4)).astype(np.float32)
    return _scaled(_fields(data[:, 16:80], 32, 2), high, low)


def _q3_k(data: Blocks) -> Singles:
    import numpy as np

    codes = _fields(data[:, 32:96], 32, 2).astype(np.int8)
    codes += (_fields(data[:, :32], 32, 1) << np.uint8(2)).astype(np.int8) - np.int8(4)
    scales = _fields(data[:, 96:104], 8, 4) | _fields(data[:, 104:108], 4, 2) << np.uint8(4)
    return _scaled(codes, _half(data, 108) * (scales.astype(np.float32) - np.float32(32)))


def _six_bit_pairs(data: Blocks) -> tuple[Singles, Singles]:
    """(scales, minima), 8 each of 6 bits, of the 12 bytes in which Q4_K and Q5_K have them."""
    import numpy as np

    four = np.uint8(4)
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.hstack([first & np.uint8(63), third & np.uint8(15) | first >> np.uint8(6) << four])
    minima = np.hstack([second & np.uint8(63), third >> four | second >> np.uint8(6) << four])
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(data: Blocks) -> Singles:
    scales, minima = _six_bit_pairs(data[:, 4:16])
    return _scaled(_fields(data[:, 16:], 32, 4), _half(data, 0) * scales, _half(data, 2) * minima)


def _q5_k(data: Blocks) -> Singles:
    import numpy as np

    scales, minima = _six_bit_pairs(data[:, 4:16])
    codes = _fields(data[:, 48:], 32, 4) | _fields(data[:, 16:48], 32, 1) << np.uint8(4)
    return _scaled(codes, _half(data, 0) * scales, _half(data, 2) * minima)


def _q6_k(data: Blocks) -> Singles:
    import numpy as np

    codes = _fields(data[:, :128], 64, 4) | _fields(data[:, 128:192], 32, 2) << np.uint8(4)
    scales = _half(data, 208) * data[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(codes.astype(np.int8) - np.int8(32), scales)


def _iq4_nl(data: Blocks) -> Singles:
    return _half(data, 0) * _looked_up(_NON_LINEAR, _fields(data[:, 2:], 16, 4))


def _iq4_xs(data: Blocks) -> Singles:
    import numpy as np

    lows = _fields(data[:, 4:8].reshape(-1, 1), 1, 4).reshape(len(data), 8)
    highs = _fields(data[:, 2:4].reshape(-1, 1), 1, 2).reshape(len(data), 8)
    scales = (lows | highs << np.uint8(4)).astype(np.float32) - np.float32(32)
    return _scaled(_looked_up(_NON_LINEAR, _fields(data[:, 8:], 16, 4)), _half(data, 0) * scales)


def _mxfp4(data: Blocks) -> Singles:
    import numpy as np

    half = np.ldexp(np.float32(1), data[:, :1].astype(np.int32) - 128)
    return np.asarray(half.astype(np.float32) * _looked_up(_E2M1_DOUBLED, _fields(data[:, 1:], 16, 4)))


def _tq2_0(data: Blocks) -> Singles:
    import numpy as np

    return np.asarray(_half(data, 64) * (_fields(data[:, :64], 32, 2).astype(np.float32) - np.float32(1)))


def _looked_up(values: tuple[int, ...], codes: Blocks) -> Singles:
    import numpy as np

    return np.array(values, np.float32)[codes]


def _scaled(codes: NDArray[np.generic], scales: Singles, minima: Singles | None = None) -> Singles:
    """Each part of a block by its own scale, minus its own minimum."""
    import numpy as np

    values = codes.reshape(len(codes), scales.shape[1], -1).astype(np.float32) * scales[..., None]
    if minima is not None:
        values -= minima[..., None]
    return values.reshape(len(codes), -1)


DECODERS: Mapping[str, Callable[[Blocks], Singles]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "TQ2_0": _tq2_0,
}
