"""The memory of one worker: allocated once, used again for every window."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraformat.model.tensors import DType, numbers_of
from loraformat.storage import PAGE_NBYTES, memory_at

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from loraformat.model.floats import Floats
    from loraformat.model.tensors import Values


@dataclass(frozen=True, slots=True)
class Block:
    """A matrix in writable memory, row-major without gaps, as in a file."""

    data: memoryview
    dtype: DType
    rows: int
    cols: int

    @property
    def bits(self) -> NDArray[Any]:
        """The same memory as (rows, cols) unsigned integers of the size of the dtype."""
        import numpy as np

        return np.frombuffer(self.data, f"<u{self.dtype.itemsize}").reshape(self.rows, self.cols)

    @property
    def numbers(self) -> Values:
        """Its values as a (rows, cols) array of `dtype.numpy`."""
        return numbers_of(self.data, self.dtype).reshape(self.rows, self.cols)

    def part(self, start: int, stop: int) -> Block:
        """Rows `start:stop` of it, the same memory."""
        row_nbytes = self.cols * self.dtype.itemsize
        return Block(self.data[start * row_nbytes : stop * row_nbytes], self.dtype, stop - start, self.cols)


class Buffers(threading.local):
    """Named runs of memory, apart in each thread; a run grows when more is asked for and is not given back."""

    def __init__(self, allocate: Callable[[int], memoryview] | None = None) -> None:
        self._allocate = allocate or (lambda nbytes: memory_at(0, nbytes))
        self._held: dict[str, memoryview] = {}

    def block(self, name: str, rows: int, cols: int, dtype: DType, phase: int = 0) -> Block:
        """A matrix in the run called `name`, values undefined.

        Args:
            phase: bytes into a page at which it begins, as far as its dtype can begin there.
        """
        begin = phase // dtype.itemsize * dtype.itemsize
        return Block(self._run(name, rows * cols * dtype.itemsize, begin), dtype, rows, cols)

    def matrix(self, name: str, rows: int, cols: int) -> Floats:
        """A (rows, cols) matrix of float64 in the run called `name`, values undefined."""
        import numpy as np

        return np.frombuffer(self._run(name, rows * cols * 8), np.float64).reshape(rows, cols)

    def _run(self, name: str, nbytes: int, phase: int = 0) -> memoryview:
        held = self._held.get(name)
        if held is None or held.nbytes < nbytes + PAGE_NBYTES:
            # The old run goes first: two at a time would be more than was asked for.
            self._held.pop(name, None)
            held = self._allocate(nbytes + PAGE_NBYTES)
            self._held[name] = held
        return held[phase : phase + nbytes]
