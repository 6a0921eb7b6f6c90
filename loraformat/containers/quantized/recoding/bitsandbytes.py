"""Codes of bitsandbytes: NF4 and FP4 in blocks of the flat weight, with plain or quantized scales, and INT8 in rows.

Source: bitsandbytes 0.50.2, functional.py `quantize_4bit`, `quantize_blockwise`, `QuantState.as_dict`,
`int8_vectorwise_quant`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraformat import strict_json
from loraformat.containers.quantized.as_trained.quantizer import (
    NESTED_BLOCK,
    code_book,
    doubly_coded,
    eight_bits,
    eight_bits_decoded,
    four_bits,
    scales_of,
)
from loraformat.containers.quantized.bitsandbytes import MOST_STATE_NBYTES, Blocks
from loraformat.containers.quantized.parts import matrix_of, whole
from loraformat.containers.quantized.recoding.encoder import Encoder, Part
from loraformat.errors import NonFiniteValue
from loraformat.model.checkpoint import Checkpoint, QuantizedWeight
from loraformat.model.tensors import DType

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Singles: TypeAlias = NDArray[np.float32]

_OFFSET = "nested_offset"
_OFFSET_NBYTES = 24  # of the longest number that `repr` gives


def encoder(stored: Checkpoint, weight: QuantizedWeight) -> Encoder | None:
    """See `encoder_of`; None where scales are quantized in other blocks than the library's."""
    if not isinstance(weight.layout, Blocks):
        return _EightBits(stored, weight)
    return _FourBits(stored, weight) if weight.layout.nested in (0, NESTED_BLOCK) else None


class _FourBits:
    """Codes by a book of 16 numbers, in blocks of the flat weight."""

    def __init__(self, stored: Checkpoint, weight: QuantizedWeight) -> None:
        import numpy as np

        assert isinstance(weight.layout, Blocks)
        self._weight, self._layout = weight, weight.layout
        self._kind = weight.parts[-1].rpartition("__")[2]
        self._width, self._count = matrix_of(weight.shape)[1], math.prod(weight.shape)
        # The book is looked up in the order of its numbers; codes are places in the order of the type.
        self._code_of = np.argsort(code_book(self._kind), kind="stable").astype(np.uint8)
        self._own = np.zeros(-(-self._count // self._layout.size), np.float32)
        self._nested = self._layout.nested > 0
        self._table = whole(stored, weight.parts[3]) if self._nested else None
        self._state = self._state_of(stored) if self._nested else {}
        self._doubly: tuple[NDArray[np.uint8], Singles, np.float32, Singles] | None = None
        self.unit = self._layout.size // math.gcd(self._width, self._layout.size)
        self.needs_scales = self._nested
        self.parts = tuple(self._parts(stored))

    def _state_of(self, stored: Checkpoint) -> dict[str, object]:
        raw = whole(stored, self._weight.parts[-1]).tobytes()
        found = strict_json.parse(raw, self._weight.parts[-1], limit=MOST_STATE_NBYTES)
        assert isinstance(found, dict)
        return dict(found)

    def _parts(self, stored: Checkpoint) -> list[Part]:
        names = self._weight.parts[:2]
        if self._nested:
            names = (*names, self._weight.parts[2])
        found = [Part(name, stored.tensors[name].dtype, stored.tensors[name].shape) for name in names]
        if self._nested:
            # As long whatever the offset will be: spaces fill the rest, which JSON allows.
            nbytes = len(self._state_bytes(0.0)) - len("0.0") + _OFFSET_NBYTES
            found.append(Part(self._weight.parts[-1], DType.U8, (nbytes,)))
        return found

    def _state_bytes(self, offset: float) -> bytes:
        return json.dumps({**self._state, _OFFSET: offset}).encode()

    def scan(self, values: Singles, start: int) -> None:
        """See `Encoder.scan`."""
        flat, first = values.reshape(-1), start * self._width // self._layout.size
        for low, blocks, _ in _blocks(flat, self._layout.size, is_end=self._is_end(start, values)):
            at = first + low // self._layout.size
            self._own[at : at + len(blocks)] = scales_of(blocks)

    def encode(self, values: Singles, start: int) -> tuple[bytes, Singles]:
        """See `Encoder.encode`."""
        import numpy as np

        size, flat = self._layout.size, values.reshape(-1)
        used = self._used(values, start)
        places, decoded = np.empty(len(flat), np.uint8), np.empty(len(flat), np.float32)
        for low, blocks, is_cut in _blocks(flat, size, is_end=self._is_end(start, values)):
            at = start * self._width // size + low // size
            mine = slice(at, at + len(blocks))
            found, book = four_bits(blocks, self._own[mine], self._kind, is_cut=is_cut)
            places[low : low + found.size] = found.reshape(-1)
            decoded[low : low + found.size] = (book[found] * used[mine][:, None]).reshape(-1)
        codes = np.zeros(len(flat) + len(flat) % 2, np.uint8)
        codes[: len(flat)] = self._code_of[places]
        return (codes[0::2] << 4 | codes[1::2]).tobytes(), decoded.reshape(values.shape)

    def _used(self, values: Singles, start: int) -> Singles:
        """The scales that codes are multiplied by; those of the rows from `start` on are known afterwards."""
        if not self._nested:
            self.scan(values, start)
            return self._own
        if self._doubly is None:
            assert self._table is not None
            self._doubly = doubly_coded(self._own, self._table)
        return self._doubly[3]

    def _is_end(self, start: int, values: Singles) -> bool:
        return (start + len(values)) * self._width == self._count

    def rest(self) -> Mapping[str, bytes]:
        """See `Encoder.rest`."""
        absmax = self.parts[1].name
        if not self._nested:
            return {absmax: self._own.tobytes()}
        assert self._doubly is not None
        codes, outer, offset, _ = self._doubly
        state = self._state_bytes(float(offset)).ljust(self.parts[3].shape[0])
        return {absmax: codes.tobytes(), self.parts[2].name: outer.tobytes(), self.parts[3].name: state}


def _blocks(flat: Singles, size: int, *, is_end: bool) -> list[tuple[int, Singles, bool]]:
    """(first weight, (blocks, weights), whether it is the rest of the weight) of whole blocks, then of the rest."""
    whole_nbytes = len(flat) // size * size
    assert is_end or whole_nbytes == len(flat)
    found = [(0, flat[:whole_nbytes].reshape(-1, size), False)] if whole_nbytes else []
    return found + ([(whole_nbytes, flat[None, whole_nbytes:], True)] if whole_nbytes < len(flat) else [])


class _EightBits:
    """Codes of a byte with a scale for each row."""

    unit, needs_scales = 1, False

    def __init__(self, stored: Checkpoint, weight: QuantizedWeight) -> None:
        import numpy as np

        self._scales = np.zeros(weight.shape[0], np.float32)
        self.parts = tuple(Part(one, stored.tensors[one].dtype, stored.tensors[one].shape) for one in weight.parts[:2])

    def scan(self, values: Singles, start: int) -> None:
        """Nothing is needed of other rows."""

    def encode(self, values: Singles, start: int) -> tuple[bytes, Singles]:
        """See `Encoder.encode`. Raises: NonFiniteValue (LF402): a value is too large for float16, by way of which
        the library goes.
        """
        import numpy as np

        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise NonFiniteValue("a merged value is too large for float16", where=self.parts[0].name)
        codes, scales = eight_bits(halves)
        self._scales[start : start + len(values)] = scales
        return codes.astype(np.int8).tobytes(), eight_bits_decoded(codes, scales)

    def rest(self) -> Mapping[str, bytes]:
        """See `Encoder.rest`."""
        return {self.parts[1].name: self._scales.tobytes()}
