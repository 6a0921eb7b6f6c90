"""A pool of threads. Reads, arithmetic and writes release the interpreter lock, so one process is enough."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
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
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="loraformat")
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * self.jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
