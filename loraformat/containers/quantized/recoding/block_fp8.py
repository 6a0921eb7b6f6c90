"""Block FP8 codes with new scales: the largest value of a block gets the largest code.

Source: transformers 5.23.0, integrations/finegrained_fp8.py `Fp8Quantize`; DeepSeek-V3 (deepseek-ai/DeepSeek-V3 at
9b4e978), inference/kernel.py `act_quant_kernel`, for powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from loraformat.containers.quantized.block_fp8 import Block
from loraformat.containers.quantized.parts import matrix_of
from loraformat.containers.quantized.recoding.encoder import Encoder, Part
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType, bytes_of, numbers_of, rounded

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

    Singles: TypeAlias = NDArray[np.float32]

LARGEST = {DType.F8_E4M3: 448.0, DType.F8_E5M2: 57344.0}
# Digits after the point, and the least exponent of numbers that have them all.
_FORMS = {DType.F8_E4M3: (3, -6), DType.F8_E5M2: (2, -14)}
_LEAST_EXPONENT, _MOST_EXPONENT = -127, 127  # of E8M0


def encoder(stored: Checkpoint, weight: QuantizedWeight) -> Encoder | None:
    """See `encoder_of`; None where one scale is for all of a matrix."""
    assert isinstance(weight.layout, Block)
    return _Blocks(stored, weight, weight.layout) if weight.layout.rows else None


class _Blocks:
    """Codes with a scale for each block of each matrix."""

    needs_scales = False

    def __init__(self, stored: Checkpoint, weight: QuantizedWeight, block: Block) -> None:
        import numpy as np

        self.parts = tuple(Part(one, stored.tensors[one].dtype, stored.tensors[one].shape) for one in weight.parts[:2])
        self._block, self._height = block, weight.shape[-2]
        self._dtype, self._scale_dtype = self.parts[0].dtype, self.parts[1].dtype
        self._grid = np.zeros((matrix_of(self.parts[1].shape)), np.float64)
        is_cut = len(weight.shape) > 2 and self._height % block.rows
        self.unit = self._height if is_cut else block.rows

    def scan(self, values: Singles, start: int) -> None:
        """Nothing is needed of other rows."""

    def encode(self, values: Singles, start: int) -> tuple[bytes, Singles]:
        """See `Encoder.encode`."""
        import numpy as np

        codes, decoded = bytearray(values.size), np.empty_like(values)
        width, low = values.shape[1], 0
        while low < len(values):
            matrix, row = divmod(start + low, self._height)
            high = min(low + self._block.rows, len(values), low + self._height - row)
            line = matrix * -(-self._height // self._block.rows) + row // self._block.rows
            block = values[low:high].astype(np.float64)
            scale = self._scales(block)
            self._grid[line] = scale
            each = np.repeat(scale, self._block.cols)[:width]
            numbers = _rounded(np.clip(block / each, -self._largest, self._largest), self._dtype)
            codes[low * width : high * width] = _code_of(self._dtype)[numbers.view(np.uint16)].tobytes()
            decoded[low:high] = numbers.astype(np.float32) * each.astype(np.float32)
            low = high
        return bytes(codes), decoded

    @property
    def _largest(self) -> float:
        return LARGEST[self._dtype]

    def _scales(self, block: Floats) -> Floats:
        """The scale of each block of columns, of the dtype of scales: never so small that a code would overflow."""
        import numpy as np

        width = block.shape[1]
        most = np.maximum.reduceat(np.abs(block).max(axis=0), np.arange(0, width, self._block.cols))
        wanted = most / self._largest
        wanted[most == 0] = 1.0
        if self._scale_dtype in (DType.U8, DType.F8_E8M0):
            digits, exponents = np.frexp(wanted)
            exponents = np.clip(np.where(digits == 0.5, exponents - 1, exponents), _LEAST_EXPONENT, _MOST_EXPONENT)
            return np.asarray(np.ldexp(1.0, exponents), np.float64)
        found = rounded(wanted, self._scale_dtype).astype(np.float64)
        # Rounded down, the largest value would be cut off: the next number is taken.
        is_less = found < wanted if self._scale_dtype.itemsize < 4 else found == 0
        return np.where(is_less, _next(found, self._scale_dtype), found)

    def rest(self) -> Mapping[str, bytes]:
        """See `Encoder.rest`."""
        import numpy as np

        name = self.parts[1].name
        if self._scale_dtype in (DType.U8, DType.F8_E8M0):
            exponents = np.frexp(self._grid)[1] - 1
            return {name: (exponents + 127).astype(np.uint8).tobytes()}
        return {name: bytes(bytes_of(rounded(self._grid, self._scale_dtype), self._scale_dtype))}


def _rounded(values: Floats, dtype: DType) -> NDArray[np.float16]:
    """Values that a float8 dtype has room for, rounded once to the nearest, ties to even; float16 has all of them."""
    import numpy as np

    digits, least = _FORMS[dtype]
    cut = 52 - digits
    bits = values.view(np.uint64)
    bits = bits + ((bits >> np.uint64(cut)) & np.uint64(1)) + np.uint64((1 << (cut - 1)) - 1)
    bits &= ~np.uint64((1 << cut) - 1)
    is_small = np.abs(values) < 2.0**least
    step = 2.0 ** (least - digits)
    return np.where(is_small, np.rint(values / step) * step, bits.view(np.float64)).astype(np.float16)


@cache
def _code_of(dtype: DType) -> NDArray[np.uint8]:
    """The code of each number of a float8 dtype, by its bits in float16."""
    import numpy as np

    found = np.zeros(1 << 16, np.uint8)
    numbers = numbers_of(bytearray(range(256)), dtype)
    codes = np.flatnonzero(np.isfinite(numbers))
    found[numbers[codes].astype(np.float16).view(np.uint16)] = codes
    return found


def _next(values: Floats, dtype: DType) -> Floats:
    """The next larger number of a dtype of 16 or 32 bits, for numbers that are not negative."""
    import numpy as np

    code = f"<u{dtype.itemsize}"
    bits = np.frombuffer(bytes_of(rounded(values, dtype), dtype), code) + np.array(1, code)
    return np.asarray(numbers_of(bits.tobytes(), dtype), np.float64).reshape(values.shape)
