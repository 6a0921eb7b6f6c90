"""GGUF blocks decoded in float64, element by element from the positions of their bits; shares nothing with `blocks`.

Source: llama.cpp of llama_cpp_python 0.3.36, ggml/src/ggml-quants.c `dequantize_row_*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks as bytes (blocks, bytes), and the numbers of their elements."""

    data: Ints
    element: Ints

    def bits(self, at: Ints, shift: Ints | int, count: int) -> Ints:
        """`count` bits of a byte for each element."""
        return self.data[:, at] >> shift & (1 << count) - 1

    def signed(self, at: Ints) -> Ints:
        """A byte for each element, with its sign."""
        import numpy as np

        found = self.data[:, at]
        return np.where(found > 127, found - 256, found)

    def half(self, at: int) -> Floats:
        """(blocks, 1): a float16."""
        import numpy as np

        bits = (self.data[:, at] + 256 * self.data[:, at + 1]).astype(np.uint16)
        return bits.view(np.float16).astype(np.float64)[:, None]

    def halves(self, at: int) -> Ints:
        """Codes of 4 bits of blocks of 32: 16 bytes hold the first half low and the second half high."""
        return self.bits(at + self.element % 16, self.element // 16 * 4, 4)

    def quarters(self, at: int) -> Ints:
        """Codes of 2 bits of blocks of 256: 32 bytes hold four runs of 32."""
        element = self.element
        return self.bits(at + element // 128 * 32 + element % 32, element % 128 // 32 * 2, 2)

    def nibbles(self, at: int) -> Ints:
        """Codes of 4 bits of blocks of 256: 32 bytes hold two runs of 32."""
        element = self.element
        return self.bits(at + element // 64 * 32 + element % 32, element % 64 // 32 * 4, 4)

    def pair(self) -> tuple[Ints, Ints]:
        """Scale and minimum of each element of Q4_K and Q5_K. Source: ggml-quants.c `get_scale_min_k4`."""
        import numpy as np

        part = self.element // 32
        late = np.maximum(part, 4)
        scale = np.where(
            part < 4, self.bits(4 + part % 4, 0, 6), self.bits(8 + late, 0, 4) + 16 * self.bits(late, 6, 2)
        )
        least = np.where(
            part < 4, self.bits(8 + part % 4, 0, 6), self.bits(8 + late, 4, 4) + 16 * self.bits(4 + late, 6, 2)
        )
        return scale, least


def reference(kind: str, data: NDArray[np.uint8], elements: int) -> Floats:
    """Values (blocks, elements), rounded to float32 wherever the gguf package rounds."""
    import numpy as np

    blocks = _Blocks(data.astype(np.int64), np.arange(elements))
    with np.errstate(over="ignore", invalid="ignore"):
        return _values(kind, blocks)


def _values(kind: str, blocks: _Blocks) -> Floats:
    import numpy as np

    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return _of_32(kind, blocks)
    if kind in ("Q4_K", "Q5_K", "Q2_K"):
        return _with_minimum(kind, blocks)
    element, signs = blocks.element, np.array(_NON_LINEAR)
    if kind == "Q8_0":
        return _rounded(blocks.half(0) * blocks.signed(2 + element))
    if kind == "Q3_K":
        code = blocks.quarters(32) - 4 * (1 - blocks.bits(element % 32, element // 32, 1))
        part = element // 16
        scale = blocks.bits(96 + part % 8, part // 8 * 4, 4) + 16 * blocks.bits(104 + part % 4, part // 4 * 2, 2)
        return _rounded(_rounded(blocks.half(108) * (scale - 32)) * code)
    if kind == "Q6_K":
        low = blocks.bits(element // 128 * 64 + element % 64, element % 128 // 64 * 4, 4)
        code = low + 16 * blocks.quarters(128) - 32
        return _rounded(_rounded(blocks.half(208) * blocks.signed(192 + element // 16)) * code)
    if kind == "IQ4_NL":
        return _rounded(blocks.half(0) * signs[blocks.halves(2)])
    if kind == "IQ4_XS":
        part = element // 32
        scale = blocks.bits(4 + part // 2, part % 2 * 4, 4) + 16 * blocks.bits(2 + part // 4, part % 4 * 2, 2)
        code = signs[blocks.bits(8 + part * 16 + element % 16, element % 32 // 16 * 4, 4)]
        return _rounded(_rounded(blocks.half(0) * (scale - 32)) * code)
    if kind == "MXFP4":
        code = blocks.halves(1)
        exponent, digit = code // 2 % 4, code % 2
        size = np.where(exponent == 0, digit * 0.5, (1 + digit * 0.5) * 2.0 ** (exponent - 1))
        return _rounded(np.ldexp(np.where(code > 7, -size, size), blocks.data[:, :1] - 127))
    assert kind == "TQ2_0"
    return _rounded(blocks.half(64) * (blocks.quarters(0) - 1))


# Source: ggml-common.h `kvalues_iq4nl`.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _of_32(kind: str, blocks: _Blocks) -> Floats:
    has_minimum, has_fifth = kind.endswith("1"), kind.startswith("Q5")
    at = 4 if has_minimum else 2
    code = blocks.halves(at + 4 * has_fifth)
    if has_fifth:
        code = code + 16 * blocks.bits(at + blocks.element // 8, blocks.element % 8, 1)
    if has_minimum:
        return _rounded(_rounded(blocks.half(0) * code) + blocks.half(2))
    return _rounded(blocks.half(0) * (code - (16 if has_fifth else 8)))


def _with_minimum(kind: str, blocks: _Blocks) -> Floats:
    element, at = blocks.element, 0
    if kind == "Q2_K":
        scale, least = blocks.bits(element // 16, 0, 4), blocks.bits(element // 16, 4, 4)
        code, at = blocks.quarters(16), 80
    else:
        scale, least = blocks.pair()
        code = blocks.nibbles(16 if kind == "Q4_K" else 48)
        if kind == "Q5_K":
            code = code + 16 * blocks.bits(16 + element % 32, element // 32, 1)
    high, low = _rounded(blocks.half(at) * scale), _rounded(blocks.half(at + 2) * least)
    return _rounded(_rounded(high * code) - low)


def _rounded(values: Floats) -> Floats:
    """To the nearest float32."""
    import numpy as np

    return np.asarray(values.astype(np.float32), np.float64)
