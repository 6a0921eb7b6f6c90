"""Executes a plan: copies files, computes windows of rows and writes them in place, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from loraformat.arithmetic import Tally
from loraformat.containers import CONTAINERS, combine_crc32, plan_file
from loraformat.containers.layout import Layout
from loraformat.engine import open_engine
from loraformat.merger.compute.computer import Computer
from loraformat.merger.compute.prepared import Steps
from loraformat.merger.compute.windows import Resources, windows
from loraformat.merger.inputs import Inputs
from loraformat.merger.plan.data import Edit, MergePlan, ShardPlan
from loraformat.merger.write.digests import Digest
from loraformat.merger.write.tasks import Done, Target, Task, tensor_copies, tensor_run, verbatim_copies, verbatim_runs
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.results.verbs import Checked
from loraformat.model.tensors import DType, Entry
from loraformat.storage import PAGE_NBYTES, Copy, Run, digest_of
from loraformat.storage.base import Store, Writer


@dataclass(slots=True)
class Written:
    """What is known of an output file when it is complete.

    Attributes:
        tallies: of each edited tensor that is not replaced.
        digests: of each edited tensor, the digest of its bytes in the file.
        runs: output file → digests of its bytes, by offset: of all of them unless copied bytes were left out.
        checked: how much of all files was compared with the inputs, once it was.
        has_list: whether the output has a list of digests.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    runs: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    checked: Checked | None = None
    has_list: bool = True


OnWritten = Callable[[str, Written], None]


def write_weights(
    plan: MergePlan,
    inputs: Inputs,
    output: Store,
    limits: Resources,
    *,
    on_written: OnWritten | None = None,
    there: Mapping[str, Written] | None = None,
    digests: bool = True,
) -> Written:
    """Write the weight files of a plan; one pool of threads for all of them.

    A file is made durable and renamed into place in a thread of its own, while the next one is computed.

    Args:
        on_written: called after each file, from that thread.
        there: files that are complete already, by name.
        digests: whether copied bytes get a digest too; computed ones always do.

    Returns: the figures of all tensors.

    Raises:
        NonFiniteValue (LF402): an adapter value, or a result where the base was finite, is NaN or infinite.
        ContainerError: a record of a `.pt` base does not have its checksum.
        StorageError: a read or write failed.
    """
    known = there or {}
    merged = all_of(known.values())
    for file in inputs.base.files.values():
        CONTAINERS[file.container].check(inputs.store, file.name)
    computer = Computer(inputs, plan.arithmetic, limits)
    engine = open_engine(limits.threads)
    finished: list[Future[None]] = []
    shards = [
        _Shard(shard, plan, inputs, output, limits, needs_digests=digests)
        for shard in plan.shards
        if shard.target not in known
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="loraformat-files") as files:
        results = engine.map(lambda task: task(), _all_tasks(shards, computer))
        try:
            for shard, done in results:
                shard.account(done, merged)
                if limits.progress is not None:
                    limits.progress(done.nbytes)
                if shard.is_complete:
                    finished.append(files.submit(shard.close, on_written))
                _raise_first(finished)
            for future in finished:
                future.result()
            for one in shards:
                merged.runs.update(one.runs)
        except BaseException:
            results.close()
            files.shutdown(cancel_futures=True)
            for shard in shards:
                shard.abandon()
            raise
    return merged


def all_of(files: Iterable[Written]) -> Written:
    """The figures of several files as one."""
    merged = Written()
    for written in files:
        merged.tallies.update(written.tallies)
        merged.digests.update(written.digests)
        merged.runs.update(written.runs)
    return merged


def _raise_first(finished: list[Future[None]]) -> None:
    """Raise what went wrong in a file that is done with; forget those that went well."""
    for future in [one for one in finished if one.done()]:
        finished.remove(future)
        future.result()


class _Shard:
    """One output file in the making."""

    def __init__(
        self,
        plan: ShardPlan,
        merge: MergePlan,
        inputs: Inputs,
        output: Store,
        limits: Resources,
        *,
        needs_digests: bool,
    ) -> None:
        self._plan, self._merge, self._inputs, self._limits = plan, merge, inputs, limits
        self._output, self._needs_digests = output, needs_digests
        self._layout = None if plan.verbatim else _layout(plan, inputs)
        self._edited = {name for edit in plan.edits for name in edit.written}
        self._context: AbstractContextManager[Writer] | None = None
        self._writer: Writer | None = None
        self._checksums = dict.fromkeys((tensor.name for tensor in plan.tensors), 0)
        self._left = 1  # the task that says that there are no more
        self._runs: list[Run] = []
        self._written = Written()

    @property
    def is_complete(self) -> bool:
        """Whether all pieces are written."""
        return self._left == 0

    @property
    def runs(self) -> Mapping[str, tuple[Run, ...]]:
        """The digests of the file, by its name, when it is closed."""
        return self._written.runs

    def tasks(self, computer: Computer) -> Iterator[Task]:
        """All pieces of work of the file; pieces of one tensor come in order of their rows."""
        file = self._inputs.base.files[self._plan.source]
        entries = _verbatim_entries(self._plan, self._inputs.base) if self._layout is None else self._layout.entries
        size = file.nbytes if self._layout is None else self._layout.nbytes
        needs_checksums = self._layout is not None and self._layout.needs_checksums
        copies = tuple(self._copies(entries, needs_checksums=needs_checksums))
        self._context = self._output.create(self._plan.target, size, copies)
        self._writer = self._context.__enter__()
        target = Target(self._writer, entries, needs_checksums, self._needs_digests)
        for task in self._pieces(target, copies, computer):
            self._left += 1
            yield task
        yield lambda: Done("", 0)

    def _copies(self, entries: Mapping[str, Entry], *, needs_checksums: bool) -> Iterator[Copy]:
        """The runs of the file that are bytes of the base's."""
        if self._plan.verbatim:
            yield from verbatim_runs(self._inputs, self._inputs.base.files[self._plan.source], self._edited)
            return
        for tensor in self._plan.tensors:
            if tensor.name not in self._edited:
                run = tensor_run(self._inputs, tensor.name, entries[tensor.name], needs_checksums=needs_checksums)
                if run is not None and run.nbytes:
                    yield run

    def _pieces(self, target: Target, copies: Sequence[Copy], computer: Computer) -> Iterator[Task]:
        if self._plan.verbatim:
            yield from verbatim_copies(copies, target)
        else:
            for tensor in self._plan.tensors:
                if tensor.name not in self._edited:
                    yield from tensor_copies(self._inputs, tensor.name, target)
        for edit in self._plan.edits:
            if edit.parts:
                from loraformat.merger.write.recoded import recoded_task

                yield recoded_task(computer, edit, self._inputs, self._limits, target)
                continue
            steps, digest = computer.steps(edit), Digest()
            for start, stop in windows(edit, self._inputs, self._limits):
                yield _window_task(computer, edit, steps, (start, stop), target, digest)

    def account(self, done: Done, merged: Written) -> None:
        """Add a piece that is written to the figures of this file and of all."""
        self._left -= 1
        if self._layout is not None and self._layout.needs_checksums and done.tensor:
            known = self._checksums[done.tensor]
            self._checksums[done.tensor] = combine_crc32(known, done.checksum, done.nbytes)
        for written in (self._written, merged):
            for tally in done.tallies or ():
                written.tallies[done.tensor] = written.tallies.get(done.tensor, Tally()) + tally
            for piece in (done, *done.parts):
                if piece.run is not None and piece.tensor in self._edited:
                    written.digests[piece.tensor] = piece.run.digest
        self._runs += [piece.run for piece in (done, *done.parts) if piece.run is not None]

    def close(self, on_written: OnWritten | None) -> None:
        """Write what frames the tensors, make the file durable and give it its name."""
        assert self._writer is not None
        assert self._context is not None
        if self._layout is not None:
            for offset, data in self._layout.frame(self._checksums):
                self._writer.write_at(offset, data)
                self._runs.append(Run(offset, len(data), digest_of(data)))
        self._written.runs[self._plan.target] = tuple(sorted(run for run in self._runs if run.nbytes))
        context, self._context = self._context, None
        context.__exit__(None, None, None)
        if on_written is not None:
            on_written(self._plan.target, self._written)

    def abandon(self) -> None:
        """Give up a file that was begun and not closed."""
        context, self._context = self._context, None
        if context is not None:
            abandoned = _Abandoned()
            try:
                context.__exit__(_Abandoned, abandoned, None)
            except _Abandoned:
                return


class _Abandoned(Exception):
    """Ends the making of a file whose merge has failed elsewhere."""


def _all_tasks(shards: list[_Shard], computer: Computer) -> Iterator[Callable[[], tuple[_Shard, Done]]]:
    for shard in shards:
        for task in shard.tasks(computer):
            yield lambda shard=shard, task=task: (shard, task())  # type: ignore[misc]


def _layout(shard: ShardPlan, inputs: Inputs) -> Layout:
    return plan_file(
        shard.container,
        {tensor.name: (DType[tensor.dtype], tensor.shape) for tensor in shard.tensors},
        metadata=shard.metadata,
        wrapper=shard.wrapper,
        aliases=shard.aliases,
        name=shard.target.rpartition(".")[0] or "archive",
        like=(inputs.store, shard.source),
    )


def _verbatim_entries(shard: ShardPlan, base: Checkpoint) -> dict[str, Entry]:
    return {tensor.name: base.as_stored.tensors[tensor.name].entry for tensor in shard.tensors}


def _window_task(
    computer: Computer, edit: Edit, steps: Steps, rows: tuple[int, int], target: Target, digest: Digest
) -> Task:
    start, stop = rows

    def run() -> Done:
        with digest.turn(start, stop) as add:
            phase = target.offset(edit.tensor, start, edit.matrix[1]) % PAGE_NBYTES
            computed = computer.window(edit, steps, start, stop, phase)
            add(computed.data)
            done = target.write(edit.tensor, computed.data, start, edit.matrix[1])
        whole: Run | None = None
        if stop == edit.matrix[0]:
            entry = target.entries[edit.tensor]
            whole = Run(entry.span.offset, entry.span.nbytes, digest.hexdigest())
        return Done(edit.tensor, done.nbytes, done.checksum, computed.tally, whole)

    return run
