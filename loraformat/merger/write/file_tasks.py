"""One weight file of an output as one task: data that another process can be given, and the receipt that comes back."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from loraformat.arithmetic import Tally
from loraformat.engine import TaskEngine, open_device
from loraformat.errors import ConfigError
from loraformat.merger.compute.windows import Resources
from loraformat.merger.inputs import open_inputs
from loraformat.merger.plan.data import MergePlan
from loraformat.merger.plan.serialized import from_plain, to_plain
from loraformat.merger.write.weights import Written, write_weights
from loraformat.model.bundle import Json
from loraformat.storage import ANYONE, Run, is_local, open_output

_LIMITS = Resources()


@dataclass(frozen=True, slots=True)
class FileTask:
    """What makes one weight file.

    Attributes:
        plan: the merge, with that file alone.
        output: URI of the folder that the file is written into.
        jobs: threads.
        memory_nbytes: for windows.
        digests: whether copied bytes get a digest too.
        permissions: mode bits that the file may have, beside what the umask takes away.
        device: see `engine.open_device`.
    """

    plan: MergePlan
    output: str
    jobs: int = 1
    memory_nbytes: int = _LIMITS.memory_nbytes
    digests: bool = True
    permissions: int = ANYONE
    device: str = "cpu"

    @property
    def target(self) -> str:
        """The name of the file."""
        return self.plan.shards[0].target

    def to_json(self) -> dict[str, Json]:
        """The task as JSON values."""
        return {**to_plain(self), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, value: Json) -> FileTask:
        """A task from what `to_json` gave. Raises ConfigError (LF103): it is not of that form."""
        if not isinstance(value, dict):
            raise ConfigError(f"expected an object, found {type(value).__name__}", where="task")
        plan = MergePlan.from_json(value.get("plan"))
        task = from_plain(cls, {**value, "plan": to_plain(plan)}, "task")
        if len(plan.shards) != 1 or task.jobs < 1 or task.memory_nbytes < 1:
            raise ConfigError("expected one weight file, at least one job and one byte of memory", where="task")
        return task


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of a weight file when it is complete.

    Attributes:
        target: its name.
        tallies: of each edited tensor that is not replaced.
        digests: of each edited tensor, the digest of its bytes in the file.
        runs: digests of the bytes of the file, by offset.
    """

    target: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    runs: tuple[tuple[int, int, str], ...] = ()

    def to_json(self) -> dict[str, Json]:
        """The receipt as JSON values."""
        return to_plain(self)

    @classmethod
    def from_json(cls, value: Json) -> Receipt:
        """A receipt from what `to_json` gave. Raises ConfigError (LF103): it is not of that form."""
        return from_plain(cls, value, "receipt")

    def written(self) -> Written:
        """The same, as `write_weights` has it of a file."""
        return Written(dict(self.tallies), dict(self.digests), {self.target: tuple(Run(*run) for run in self.runs)})


class FileEngine(Protocol):
    """Runs tasks anywhere, several at a time: in processes, on other machines."""

    def run(self, tasks: Iterable[FileTask]) -> Iterator[Receipt]:
        """A receipt for each task, in any order; what a task raises is raised."""


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Tasks in whatever calls functions elsewhere.

    Attributes:
        engine: where they are called.
        device: on which processor they compute there; see `engine.open_device`.
    """

    engine: TaskEngine
    device: str = "cpu"

    def run(self, tasks: Iterable[FileTask]) -> Generator[Receipt, None, None]:
        """See FileEngine."""
        known = [replace(task, device=self.device) for task in tasks]
        threads = max((task.jobs for task in known), default=1)
        gpus = int(self.device.startswith("cuda"))
        return self.engine.map_unordered(execute, known, threads=threads, gpus=gpus)


def tasks_of(
    plan: MergePlan,
    output: str,
    *,
    without: Iterable[str] = (),
    limits: Resources = _LIMITS,
    digests: bool = True,
    permissions: int = ANYONE,
) -> tuple[FileTask, ...]:
    """The tasks of a plan, but for files that are there; paths of this machine do not depend on the current folder."""
    there, plan = set(without), _absolute(plan)
    return tuple(
        FileTask(
            plan.only(shard.target),
            output,
            jobs=limits.jobs,
            memory_nbytes=limits.memory_nbytes,
            digests=digests,
            permissions=permissions,
            device="cpu" if limits.device is None else str(limits.device),
        )
        for shard in plan.shards
        if shard.target not in there
    )


def _absolute(plan: MergePlan) -> MergePlan:
    adapters = tuple(replace(one, uri=_absolute_uri(one.uri)) for one in plan.adapters)
    return replace(plan, base=_absolute_uri(plan.base), adapters=adapters)


def _absolute_uri(uri: str) -> str:
    return os.path.abspath(uri) if is_local(uri) else uri


def execute(task: FileTask) -> Receipt:
    """Open what a task needs and write its file; nothing is shared with whoever made the task.

    Raises: as `open_inputs` and `write_weights`.
    """
    limits = Resources(jobs=task.jobs, device=open_device(task.device), memory_nbytes=task.memory_nbytes)
    inputs, output = open_inputs(task.plan), open_output(task.output, task.permissions)
    written = write_weights(task.plan, inputs, output, limits, digests=task.digests)
    return receipt_of(task.target, written)


def receipt_of(target: str, written: Written) -> Receipt:
    """What `write_weights` says of one file, as a receipt."""
    runs = tuple((run.offset, run.nbytes, run.digest) for run in written.runs[target])
    return Receipt(target, written.tallies, written.digests, runs)
