"""Splits a file into the parts of an upload: ranges that the store copies, and ranges that are sent."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from loraformat.errors import StorageError
from loraformat.storage.base import Copy

# S3's own limits: a part but the last has at least 5 MiB, a copy at most 5 GiB, an upload at most 10,000 parts.
LEAST_NBYTES = 5 << 20
MOST_PARTS = 10_000
PART_NBYTES = 16 << 20
_COPY_NBYTES = 1 << 30
_MOST_PART_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an upload.

    Attributes:
        number: counted from 1.
        start, stop: its bytes in the file.
        copy: what the store copies into it; None for a part that is sent.
        fills: of a part that is sent, the ranges that are bytes of other files, in order.
    """

    number: int
    start: int
    stop: int
    copy: Copy | None = None
    fills: tuple[Copy, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    stop: int
    copy: Copy | None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def cut(
    size: int, copies: Sequence[Copy], fills: Sequence[Copy], part_nbytes: int = PART_NBYTES, most: int = MOST_PARTS
) -> tuple[Part, ...]:
    """The parts of a file of `size` bytes, at least one.

    Args:
        copies: runs that the store can copy, apart from each other.
        fills: runs whose bytes can be fetched when a part that needs them is sent; `copies` among them.
        part_nbytes: about how much is sent at a time; more where there would be too many parts.
        most: parts.

    Raises: StorageError: the file is too large for an upload.
    """
    least = LEAST_NBYTES
    while True:
        segments = _segments(size, _joined(copies), least)
        if sum(_count(segment, part_nbytes) for segment in segments) <= most:
            break
        if part_nbytes >= _MOST_PART_NBYTES:
            raise StorageError(f"a file of {size} bytes takes more than {most} parts")
        part_nbytes, least = 2 * part_nbytes, 2 * least
    parts = [piece for segment in segments for piece in _pieces(segment, part_nbytes)]
    ordered = sorted(fills, key=lambda one: one.offset)
    return tuple(
        Part(number, one.start, one.stop, one.copy, () if one.copy else tuple(_within(ordered, one.start, one.stop)))
        for number, one in enumerate(parts, 1)
    )


def _joined(copies: Sequence[Copy]) -> list[Copy]:
    """Runs in order; those that continue each other in both files as one."""
    found: list[Copy] = []
    for copy in sorted(copies, key=lambda one: one.offset):
        last = found[-1] if found else None
        if (
            last is not None
            and (last.source, last.path) == (copy.source, copy.path)
            and last.offset + last.nbytes == copy.offset
            and last.source_offset + last.nbytes == copy.source_offset
        ):
            found[-1] = last._replace(nbytes=last.nbytes + copy.nbytes)
        elif copy.nbytes:
            found.append(copy)
    return found


def _segments(size: int, copies: Sequence[Copy], least: int) -> list[_Segment]:
    """The file from begin to end, sent and copied in turn; each but the last at least `least` bytes long.

    What is sent is widened into the copy after it; a copy that is too short for a part is sent.
    """
    found: list[_Segment] = []

    def send(start: int, stop: int) -> None:
        if stop <= start:
            return
        if found and found[-1].copy is None:
            start = found.pop().start
        found.append(_Segment(start, stop, None))

    position = 0
    for copy in copies:
        send(position, copy.offset)
        start, position = copy.offset, copy.offset + copy.nbytes
        if found and found[-1].copy is None and found[-1].nbytes < least:
            widened = min(position, start + least - found[-1].nbytes)
            send(start, widened)
            start = widened
        if position - start < least and position != size:
            send(start, position)
        elif position > start:
            found.append(_Segment(start, position, _part_of(copy, start, position)))
    send(position, size)
    return found or [_Segment(0, size, None)]


def _count(segment: _Segment, part_nbytes: int) -> int:
    return max(1, -(-segment.nbytes // (part_nbytes if segment.copy is None else _COPY_NBYTES)))


def _pieces(segment: _Segment, part_nbytes: int) -> Iterator[_Segment]:
    """A segment as pieces of nearly equal length: none is shorter than half of what is meant."""
    step = -(-segment.nbytes // _count(segment, part_nbytes))
    for start in range(segment.start, max(segment.stop, segment.start + 1), max(step, 1)):
        stop = min(start + step, segment.stop)
        yield _Segment(start, stop, None if segment.copy is None else _part_of(segment.copy, start, stop))


def _within(runs: Sequence[Copy], start: int, stop: int) -> Iterator[Copy]:
    """The runs as far as they lie in a range."""
    first = max(0, bisect_right(runs, start, key=lambda one: one.offset) - 1)
    for run in islice(runs, first, None):
        if run.offset >= stop:
            return
        low, high = max(start, run.offset), min(stop, run.offset + run.nbytes)
        if low < high:
            yield _part_of(run, low, high)


def _part_of(run: Copy, start: int, stop: int) -> Copy:
    return run._replace(offset=start, nbytes=stop - start, source_offset=run.source_offset + start - run.offset)
