"""Tasks in anything with the interface of `concurrent.futures.Executor`: processes, Dask, MPI pools."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ExecutorEngine:
    """Calls in an executor of the caller, who closes it.

    Attributes:
        executor: functions and items that are given to it can be pickled.
    """

    executor: Executor

    def map_unordered(
        self, function: Callable[[T], R], items: Iterable[T], *, threads: int = 1, gpus: int = 0
    ) -> Generator[R, None, None]:
        """Results as they come. The first exception, or closing, cancels what is not begun and waits for the rest."""
        del threads, gpus  # an executor has its own idea of what a worker is
        futures = [self.executor.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()
