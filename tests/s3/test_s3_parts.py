"""How a file is cut: S3's own limits, every byte once, and each copied byte from where it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.errors import StorageError
from loraformat.storage import MemoryStore
from loraformat.storage.base import Copy
from loraformat.storage.s3.buffers import PartBuffer
from loraformat.storage.s3.parts import LEAST_NBYTES, MOST_PARTS, PART_NBYTES, Part, cut

MIB = 1 << 20
SOURCE = MemoryStore({"a": b"", "b": b""})


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Copy]]:
    """A size, and runs of one of two files with gaps between some of them."""
    runs, position = [], 0
    for _ in range(draw(st.integers(0, 8))):
        position += draw(st.sampled_from([0, 0, 1, 100, MIB, 6 * MIB, 40 * MIB]))
        nbytes = draw(st.sampled_from([1, 1000, 4 * MIB, 5 * MIB, 5 * MIB + 1, 21 * MIB, 3000 * MIB]))
        runs.append(Copy(position, nbytes, SOURCE, draw(st.sampled_from("ab")), draw(st.integers(0, 1 << 40))))
        position += nbytes
    return position + draw(st.sampled_from([0, 1, MIB, 20 * MIB])), runs


@given(layouts())
def test_parts_cover_the_file_and_keep_to_the_limits_of_s3(layout: tuple[int, list[Copy]]) -> None:
    size, runs = layout
    parts = cut(size, runs, runs)
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert parts[0].start == 0
    assert parts[-1].stop == size
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.nbytes >= LEAST_NBYTES for part in parts[:-1])
    assert all(part.nbytes <= (5 << 30 if part.copy else 2 * PART_NBYTES) for part in parts)
    assert len(parts) <= MOST_PARTS


@given(layouts())
def test_what_is_copied_or_fetched_is_what_was_announced(layout: tuple[int, list[Copy]]) -> None:
    size, runs = layout
    for part in cut(size, runs, runs):
        for piece in [part.copy] if part.copy else part.fills:
            assert part.start <= piece.offset
            assert piece.offset + piece.nbytes <= part.stop
            run = next(run for run in runs if run.offset <= piece.offset < run.offset + run.nbytes)
            assert piece.offset + piece.nbytes <= run.offset + run.nbytes
            assert (piece.path, piece.source_offset) == (run.path, run.source_offset + piece.offset - run.offset)
        if part.copy:
            assert (part.copy.offset, part.copy.nbytes) == (part.start, part.nbytes)
        else:
            announced = sum(
                max(0, min(part.stop, run.offset + run.nbytes) - max(part.start, run.offset)) for run in runs
            )
            assert sum(fill.nbytes for fill in part.fills) == announced


@given(layouts())
def test_no_more_is_sent_than_widening_needs(layout: tuple[int, list[Copy]]) -> None:
    size, runs = layout
    sent = sum(part.nbytes for part in cut(size, runs, runs) if part.copy is None)
    computed = size - sum(run.nbytes for run in runs)
    assert sent <= computed + 2 * LEAST_NBYTES * (len(runs) + 1)


@given(st.permutations(range(8)), st.integers(0, 7), st.integers(-2, 2))
def test_bytes_come_in_any_order_and_once(order: list[int], again: int, shift: int) -> None:
    data = bytes(range(80))
    buffer = PartBuffer(Part(1, 0, 80))
    for index in order[:-1]:
        buffer.write(10 * index, memoryview(data)[10 * index : 10 * index + 10])
    assert buffer.missing == 10
    start = max(0, 10 * again + shift)
    if {start // 10, (start + 4) // 10} != {order[-1]}:
        with pytest.raises(StorageError, match="twice"):
            buffer.write(start, memoryview(bytes(5)))
    buffer.write(10 * order[-1], memoryview(data)[10 * order[-1] : 10 * order[-1] + 10])
    assert buffer.missing == 0
    assert buffer.take() == data


def test_small_files_are_one_part() -> None:
    assert cut(0, [], []) == (Part(1, 0, 0),)
    assert cut(10, [], []) == (Part(1, 0, 10),)


def test_a_large_file_gets_larger_parts() -> None:
    parts = cut(1 << 40, [], [])
    assert len(parts) <= MOST_PARTS
    with pytest.raises(StorageError, match="parts"):
        cut(1 << 50, [], [])
