"""The same weights by independent code, for `--verify`: from the position of each value in the flat weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraformat.containers.quantized.as_trained.quantizer import code_book, dynamic_map
from loraformat.containers.quantized.parts import Held
from loraformat.containers.quantized.reference import single
from loraformat.model.checkpoint import BaseWeight, Checkpoint, QuantizedWeight
from loraformat.model.floats import decoded

if TYPE_CHECKING:
    from loraformat.model.floats import Floats

_NESTED = 256
_MOST_BLOCKS = 8192  # whose scales are made at a time


def decoded_rows(
    stored: Checkpoint, weight: QuantizedWeight, settings: str, rows: tuple[int, int], held: Held
) -> Floats:
    """Rows of a matrix as its quantizer leaves them; only the code books are those of the merge.

    Args:
        settings: of the quantizer, as text.
        held: keeps the scales of a weight whose scales are quantized too.
    """
    import numpy as np

    words, source = settings.split(","), stored.weights[weight.name]
    if words[0] == "int8":
        return _eight_bits(decoded(source.raw(*rows), source.dtype).reshape(rows[1] - rows[0], weight.shape[1]))
    size = next((int(word[6:]) for word in words if word.startswith("block=")), 64)
    count, width = math.prod(weight.shape), weight.shape[1]
    index = np.arange(rows[0] * width, rows[1] * width)
    if not len(index):
        return np.zeros((0, width))
    block = index // size
    own = _scales(source, size, int(block[0]), int(block[-1]) + 1)[block - block[0]]
    used = own
    if "double" in words:
        used = held.get((weight.name, 1), lambda: _doubly(_scales(source, size, 0, -(-count // size))))[block]
    value = decoded(source.raw(*rows), source.dtype)
    least = np.maximum(own, float(np.float32(1e-38)))
    # The library divides the rest of a weight by its scale, and multiplies all other blocks by the inverse.
    ratio = np.where((block + 1) * size > count, single(value / least), single(value * single(1.0 / least)))
    book = np.sort(code_book(words[0]).astype(np.float64))
    nearest = np.digitize(np.clip(ratio, -1, 1), single((book[1:] + book[:-1]) / 2), right=True)
    return single(book[nearest] * used).reshape(rows[1] - rows[0], width)


def _eight_bits(value: Floats) -> Floats:
    import numpy as np

    half = value.astype(np.float16).astype(np.float64)
    scale = np.abs(half).max(axis=1, initial=0)[:, None]
    codes = np.round(single(half * single(127.0 * single(1 / np.where(scale == 0, np.inf, scale)))))
    return single(single((codes + 0.0) * scale) * float(np.float32(1 / 127)))


def _scales(source: BaseWeight, size: int, first: int, last: int) -> Floats:
    """The largest sizes of blocks `first:last` of the flat weight."""
    import numpy as np

    count, width = math.prod(source.shape), source.shape[1]
    found = []
    for block in range(first, last, _MOST_BLOCKS):
        low, high = block * size, min(count, min(last, block + _MOST_BLOCKS) * size)
        row = low // width
        value = np.abs(decoded(source.raw(row, -(-high // width)), source.dtype))[
            low - row * width : high - row * width
        ]
        found.append(np.maximum.reduceat(value, np.arange(0, len(value), size)))
    return np.concatenate(found)


def _doubly(scales: Floats) -> Floats:
    """Scales that are quantized themselves, a block of 256 after the other."""
    import numpy as np

    mean = float(np.float32(math.fsum(scales.tolist()) / len(scales)))
    table = dynamic_map().astype(np.float64)
    middles = single((table[1:] + table[:-1]) / 2)
    found = []
    for low in range(0, len(scales), _NESTED):
        part = single(scales[low : low + _NESTED] - mean)
        most = np.abs(part).max()
        normed = single(part * float(np.float32(1 / most))) if most else part
        found.append(single(single(table[np.digitize(normed, middles, right=True)] * most) + mean))
    return np.concatenate(found)
