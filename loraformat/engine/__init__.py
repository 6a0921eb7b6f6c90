"""Where work runs: a function, items, results in order. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Protocol, TypeVar

from loraformat.engine.devices import open_device
from loraformat.engine.local import LocalEngine

__all__ = ["Engine", "open_device", "open_engine", "resources"]

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Maps a function over items, several at a time."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Results in the order of the items. The first exception, or closing, ends the run."""


def open_engine(jobs: int) -> Engine:
    """An engine of `jobs` threads; 1 runs everything in the calling thread."""
    return LocalEngine(jobs)
