"""A pool of threads. Reads, arithmetic and writes release the interpreter lock, so one process is enough."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """Threads of this process.

    Attributes:
        jobs: how many run at a time, at least 1.
    """

    jobs: int

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Results in the order of the items; at most `2 * jobs` items are in flight, so items may be many and lazy.

        Closing it ends the run: what is in flight is waited for, the rest is not begun.
        """
        if self.jobs <= 1:
            yield from map(function, items)
            return
        from concurrent.futures import ThreadPoolExecutor

        pending: deque[Future[R]] = deque()
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="loraformat", initializer=_compute_alone)
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * self.jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _compute_alone() -> None:
    """Every thread has a number of torch's threads of its own, and a product over several threads has other bits."""
    if "torch" in sys.modules:
        import torch  # which waits for another thread that is just importing it

        torch.set_num_threads(1)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """A block in which torch computes in the calling thread alone, so that workers do not fight for processors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
