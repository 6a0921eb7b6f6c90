"""What computes the weight files of an output: this process, remote workers, or several runs with a share each."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeAlias, cast

from loraformat.engine import open_device, open_task_engine
from loraformat.errors import MergeError, UsageError
from loraformat.merger import (
    Facts,
    FileEngine,
    MergePlan,
    Resources,
    Share,
    TaskFiles,
    differences,
    facts_in,
    shares_of,
)
from loraformat.merger.plan.data import nbytes_of
from loraformat.merger.write.receipts import MOST_WORLD
from loraformat.model.results.verbs import FileShare
from loraformat.storage import unfinished

Engine: TypeAlias = str | Executor | FileEngine


@dataclass(frozen=True, slots=True)
class Distribution:
    """Who computes what.

    Attributes:
        engine: writes whole files; None for threads of this process.
        share: the part of the files that this process computes; None for all.
        is_finish: whether all shares are there, and the output is to be made of them.
    """

    engine: FileEngine | None = None
    share: Share | None = None
    is_finish: bool = False

    def described(self, plan: MergePlan) -> FileShare | None:
        """What a report says of a share."""
        if self.share is None:
            return None
        files = shares_of(plan, self.share.world)[self.share.rank]
        nbytes = sum(nbytes_of(tensor) for one in plan.shards if one.target in files for tensor in one.tensors)
        return FileShare(rank=self.share.rank, world=self.share.world, files=files, nbytes=nbytes)


ALONE = Distribution()


def distribution(
    engine: Engine,
    rank: int | None,
    world: int | None,
    *,
    finish: bool,
    resume: bool,
    dry_run: bool,
    device: str = "cpu",
) -> Distribution:
    """The options of a verb about who computes.

    Args:
        engine: "threads", "ray", "ray=ADDRESS", an executor, or an engine of the caller.
        rank, world: this process computes the `rank`-th of `world` shares.
        finish: all ranks are done.
        device: of the engine's workers.

    Raises: UsageError (LF021): options that do not go together. EngineError (LF025), MissingExtra (LF029).
    """
    if world is not None and not 1 <= world <= MOST_WORLD:
        raise UsageError(f"expected 1 to {MOST_WORLD}, found {world}", where="--world")
    if finish and world is not None and rank is None:
        hint = "the receipts of the ranks record how many there were"
        raise UsageError("--finish does not take --world", where="--finish", hint=hint)
    if (rank is None) != (world is None):
        text = "--rank and --world must be used together: this process computes share --rank of --world"
        raise UsageError(text, where="--rank" if world is None else "--world")
    if rank is not None and world is not None and not 0 <= rank < world:
        raise UsageError(f"expected 0 to {world - 1} of {world}, found {rank}", where="--rank")
    is_divided = finish or rank is not None
    option = "--finish" if finish else "--rank"
    others = {
        "--rank": finish and rank is not None,
        "--resume": resume,
        "--dry-run": dry_run,
        "--engine": engine != "threads",
    }
    for other, is_given in others.items():
        if is_divided and is_given:
            hint = "ranks always continue where they stopped" if other == "--resume" else ""
            raise UsageError(f"{other} cannot be combined with {option}", where=option, hint=hint)
    if hasattr(engine, "run"):
        return Distribution(cast("FileEngine", engine))
    share = None if rank is None or world is None else Share(rank, world)
    found = open_task_engine(engine, is_opened=not dry_run)
    if found is None:
        return Distribution(share=share, is_finish=finish)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"expected cpu or cuda, found {device!r}: the engine chooses the GPU", where="--device")
    return Distribution(TaskFiles(found, device))


def require_ranks(out: str, facts: Facts) -> None:
    """Raises: MergeError (LF801): ranks have written something there, with other inputs or options than these."""
    found = [theirs for store in unfinished(out) for theirs in facts_in(store)]
    if found and facts not in found:
        raise MergeError(
            f"the files there belong to ranks of another run: {differences(found[-1], facts)}",
            where=out,
            hint="run --finish with the same inputs and options as the ranks",
        )


def resources(distribution: Distribution, jobs: int, device: str, memory_nbytes: int) -> Resources:
    """What this process may use; workers elsewhere have the device, if there are any."""
    opened = None if distribution.engine is not None else open_device(device)
    return Resources(jobs=jobs, device=opened, memory_nbytes=memory_nbytes)
