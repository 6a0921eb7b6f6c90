"""Pieces of work that write into one output file: byte ranges to copy, and positions of the rows of a tensor."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TypeAlias

from loraformat.arithmetic import Tally
from loraformat.merger.inputs import Inputs
from loraformat.model.checkpoint import BaseWeight, WeightFile
from loraformat.model.tensors import Entry, bytes_of
from loraformat.storage import Copy, Run, Writer, copy_blocks, digest_of, digest_of_range, new_hash

_RUN_NBYTES = 64 << 20
_BLOCK_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Done:
    """A piece that is written.

    Attributes:
        tensor: which; "" for a run over several.
        checksum: the CRC-32 of its bytes, where wanted.
        tallies: one for each tile; None for what is copied or replaced.
        run: the digest of bytes of the file: of this piece where it is copied, of the whole tensor with the last window
            of an edited one; None where no digest is wanted, or not yet known.
        parts: the tensors that the piece consists of, where it is all of a weight in codes.
    """

    tensor: str
    nbytes: int
    checksum: int = 0
    tallies: tuple[Tally, ...] | None = None
    run: Run | None = None
    parts: tuple[Done, ...] = ()


Task: TypeAlias = Callable[[], Done]


@dataclass(frozen=True, slots=True)
class Target:
    """An output file that is being written.

    Attributes:
        entries: where each tensor goes.
        needs_checksums: whether pieces must carry their CRC-32.
        needs_digests: whether copied pieces must carry their digest.
    """

    writer: Writer
    entries: Mapping[str, Entry]
    needs_checksums: bool
    needs_digests: bool

    def offset(self, tensor: str, row: int, cols: int) -> int:
        """Where a row of `cols` columns begins in the file."""
        entry = self.entries[tensor]
        return entry.span.offset + row * cols * entry.dtype.itemsize

    def write(self, tensor: str, data: memoryview, start: int, cols: int) -> Done:
        """Write the bytes of rows of `tensor`, `cols` columns each, from row `start` on."""
        self.writer.write_at(self.offset(tensor, start, cols), data)
        return Done(tensor, data.nbytes, zlib.crc32(data) if self.needs_checksums else 0)


def columns_of(shape: Sequence[int]) -> int:
    """Columns of a tensor seen as a matrix: its trailing axes flattened; 1 for a vector."""
    return math.prod(shape[1:])


def verbatim_runs(inputs: Inputs, file: WeightFile, edited: AbstractSet[str]) -> Iterator[Copy]:
    """Everything of a file but the edited tensors, header included, as long runs at their own offsets."""
    spans = sorted(
        (span.offset, span.end) for name in edited if (span := inputs.base.as_stored.tensors[name].span).nbytes
    )
    position = 0
    for stop, resume in [*spans, (file.nbytes, file.nbytes)]:
        if stop > position:
            yield Copy(position, stop - position, inputs.store, file.name, position)
        position = resume


def tensor_run(inputs: Inputs, name: str, entry: Entry, *, needs_checksums: bool) -> Copy | None:
    """An untouched tensor as one run, where its bytes stand in order and need no checksum; else None."""
    weight = inputs.base.as_stored.weights[name]
    if needs_checksums or not weight.is_copyable:
        return None
    (stored,) = weight.parts
    return Copy(entry.span.offset, entry.span.nbytes, inputs.store, stored.file, stored.span.offset)


def verbatim_copies(copies: Sequence[Copy], target: Target) -> Iterator[Task]:
    """The runs of `verbatim_runs`.

    Nothing is left to write where the file system lets two files share their blocks: the edits are written over them.
    """
    is_there = bool(copies) and target.writer.clone_from(copies[0].source, copies[0].path)
    if is_there and not target.needs_digests:
        return
    for copy in copies:
        yield from _runs(copy, target, is_there=is_there)


def tensor_copies(inputs: Inputs, name: str, target: Target) -> Iterator[Task]:
    """An untouched tensor: as one run where it is one, else block by block."""
    weight, entry = inputs.base.as_stored.weights[name], target.entries[name]
    copy = tensor_run(inputs, name, entry, needs_checksums=target.needs_checksums)
    if copy is not None:
        yield from _runs(copy, target)
        return
    step = max(1, _BLOCK_NBYTES // max(1, weight.row_nbytes) if weight.is_copyable else weight.rows)
    for start in range(0, weight.rows, step):
        yield _block(weight, start, min(start + step, weight.rows), target)


def _runs(copy: Copy, target: Target, *, is_there: bool = False) -> Iterator[Task]:
    """Pieces of at most 64 MiB; where the bytes `is_there` already, only their digests are made."""
    for done in range(0, copy.nbytes, _RUN_NBYTES):
        count = min(_RUN_NBYTES, copy.nbytes - done)
        part = copy._replace(offset=copy.offset + done, nbytes=count, source_offset=copy.source_offset + done)
        yield _digest(part) if is_there else _run(part, target)


def _digest(copy: Copy) -> Task:
    def run() -> Done:
        digest = digest_of_range(copy.source, copy.path, copy.source_offset, copy.nbytes)
        return Done("", copy.nbytes, run=Run(copy.offset, copy.nbytes, digest))

    return run


def _run(copy: Copy, target: Target) -> Task:
    offset, nbytes, source, path, source_offset = copy

    def run() -> Done:
        if not target.needs_digests:
            target.writer.copy_from(source, path, source_offset, offset, nbytes)
            return Done("", nbytes)
        total = new_hash()
        copy_blocks(target.writer, source, path, source_offset, offset, nbytes, total.update)
        return Done("", nbytes, run=Run(offset, nbytes, total.hexdigest()))

    return run


def _block(weight: BaseWeight, start: int, stop: int, target: Target) -> Task:
    def run() -> Done:
        is_ready = weight.is_copyable
        data = memoryview(weight.raw(start, stop)) if is_ready else bytes_of(weight.read(start, stop), weight.dtype)
        done = target.write(weight.name, data, start, columns_of(weight.shape))
        if not target.needs_digests:
            return done
        offset = target.offset(weight.name, start, columns_of(weight.shape))
        return replace(done, run=Run(offset, data.nbytes, digest_of(data)))

    return run
