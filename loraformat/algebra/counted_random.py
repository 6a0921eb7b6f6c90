"""Random numbers as functions of a seed, a name and a position, so that windows and threads do not change them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraformat.model.floats import Floats

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(seed: int, *names: object) -> int:
    """A key of 64 bits for the numbers of one seed and one name, by SHA-256."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def uniform(key: int, start: int, stop: int) -> Floats:
    """Numbers `start` to `stop` of a sequence, each from 0 up to 1, of 53 bits.

    >>> whole = uniform(key_of(7, "q_proj"), 0, 8)
    >>> bool((uniform(key_of(7, "q_proj"), 3, 8) == whole[3:]).all()), bool((whole < 1).all())
    (True, True)

    Source: splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") of a counter.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        found: NDArray[np.uint64] = np.arange(start + 1, stop + 1, dtype=np.uint64)
        found *= np.uint64(_STEP)
        found += np.uint64(key)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(_FIRST)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(_SECOND)
        found ^= found >> np.uint64(31)
    return np.asarray((found >> np.uint64(11)) * 2.0**-53, np.float64)


def gaussian(key: int, rows: int, cols: int) -> Floats:
    """(rows, cols) normally distributed numbers (Box and Muller 1958)."""
    import numpy as np

    radii, angles = uniform(key, 0, 2 * rows * cols).reshape(2, rows, cols)
    return np.asarray(np.sqrt(-2.0 * np.log1p(-radii)) * np.cos(2.0 * np.pi * angles), np.float64)
