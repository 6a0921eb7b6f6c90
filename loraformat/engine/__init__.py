"""Where work runs: threads of this process for pieces of a file, anything for whole files. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from loraformat.diagnostics import show_address
from loraformat.engine.devices import open_device
from loraformat.engine.local import LocalEngine
from loraformat.errors import UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Engine", "TaskEngine", "open_device", "open_engine", "open_task_engine", "resources"]

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Maps a function over items, several at a time."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        """Results in the order of the items. The first exception, or closing, ends the run."""


class TaskEngine(Protocol):
    """Calls a function that can be pickled, for items that can be pickled, in other processes or on other machines."""

    def map_unordered(
        self, function: Callable[[T], R], items: Iterable[T], *, threads: int = 1, gpus: int = 0
    ) -> Generator[R, None, None]:
        """Results as they come. The first exception, or closing, ends the run: then no call runs any more.

        Args: threads, gpus: that each call uses.
        """


def open_task_engine(name: str | Executor, *, is_opened: bool = True) -> TaskEngine | None:
    """The engine called "ray" or "ray=ADDRESS", or an executor as one; None for "threads".

    Args:
        is_opened: False for a run that needs no engine: its name is checked, and None returned.

    Raises: UsageError (LF021): there is none of this name; and as `RayEngine.open`.
    """
    if not isinstance(name, str):
        from loraformat.engine.executors import ExecutorEngine

        return ExecutorEngine(name) if is_opened else None
    kind, equals, address = name.partition("=")
    if name == "threads":
        return None
    if kind != "ray" or (equals and not address):
        raise UsageError(f"expected threads, ray or ray=ADDRESS, found {show_address(name)!r}", where="--engine")
    from loraformat.engine.ray import RayEngine, check_address

    if not is_opened:
        check_address(address)
        return None
    return RayEngine.open(address)


def open_engine(jobs: int) -> Engine:
    """An engine of `jobs` threads; 1 runs everything in the calling thread."""
    return LocalEngine(jobs)
