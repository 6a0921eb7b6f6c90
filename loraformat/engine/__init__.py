"""Where work runs: a function, items, results in order. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from loraformat.engine.local import LocalEngine

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Maps a function over items, several at a time."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items. The first exception ends the run and is raised."""


def open_engine(jobs: int) -> Engine:
    """An engine of `jobs` threads; 1 runs everything in the calling thread."""
    return LocalEngine(jobs)
