"""What a seeded generator of PyTorch draws on a CPU, without PyTorch: uniform values and permutations.

Source: PyTorch 2.13, aten/src/ATen/core/MT19937RNGEngine.h; core/TransformationHelper.h `uniform_real`;
native/TensorFactories.cpp `randperm_cpu`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.random import RandomState
    from numpy.typing import NDArray

# A permutation of as many values or more is drawn in another way.
_LARGE = (2**32 - 1) // 20
_DRAWN_AT_A_TIME = 1 << 20


class TorchGenerator:
    """`torch.Generator(device="cpu").manual_seed(seed)`: the Mersenne twister, of whose seed the low 32 bits count.

    >>> TorchGenerator(0).uniform((2,), 1.0)
    array([-0.00748682,  0.5364436 ], dtype=float32)
    >>> TorchGenerator(0).permutation_start(10, 4)
    array([4, 1, 7, 5])
    """

    def __init__(self, seed: int) -> None:
        from numpy.random import RandomState

        self._state: RandomState = RandomState(seed % 2**32)

    def _draws(self, count: int) -> NDArray[np.uint32]:
        import numpy as np

        return self._state.randint(0, 2**32, size=count, dtype=np.uint32)

    def uniform(self, shape: tuple[int, ...], bound: float) -> NDArray[np.float32]:
        """`torch.empty(shape).uniform_(-bound, bound)`: 24 bits a value, scaled and moved with one rounding.

        PyTorch rounds once where the processor has fused multiply-add, as those that it is built for today do.
        """
        import numpy as np

        draws = self._draws(math.prod(shape))
        low, high = np.float32(-bound), np.float32(bound)
        # In float64 product and sum are exact: 24 bits times 24 bits, and a number of the same grid.
        parts = (draws & np.uint32(2**24 - 1)).astype(np.float64) * 2.0**-24
        values: NDArray[np.float32] = (parts * np.float64(high - low) + np.float64(low)).astype(np.float32)
        return values.reshape(shape)

    def permutation_start(self, length: int, count: int) -> NDArray[np.int64]:
        """`torch.randperm(length)[:count]`, in memory of `count` values.

        Args:
            count: at most `length`.
        """
        import numpy as np

        if length >= _LARGE:
            return self._start_of_large(length, count)
        # Step i swaps value i with one behind it, so the first ones are settled after as many steps.
        moved: dict[int, int] = {}
        found = np.empty(count, np.int64)
        for place, draw in enumerate(self._draws(count).tolist()):
            other = place + draw % (length - place)
            found[place] = moved.get(other, other)
            moved[other] = moved.pop(place, place)
        return found

    def _start_of_large(self, length: int, count: int) -> NDArray[np.int64]:
        """Step i writes i to a place up to i and what was there to place i, with two draws for each step."""
        import numpy as np

        found = np.zeros(count, np.int64)
        for start in range(0, length, _DRAWN_AT_A_TIME):
            stop = min(start + _DRAWN_AT_A_TIME, length)
            halves = self._draws(2 * (stop - start)).astype(np.uint64).reshape(-1, 2)
            steps = np.arange(start, stop, dtype=np.uint64)
            places = ((halves[:, 0] << np.uint64(32)) | halves[:, 1]) % (steps + np.uint64(1))
            chosen = np.flatnonzero((places < count) | (steps < count))
            for step, place in zip(steps[chosen].tolist(), places[chosen].tolist(), strict=True):
                if step < count:
                    found[step] = found[place]
                if place < count:
                    found[place] = step
        return found
