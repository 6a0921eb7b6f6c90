"""Writing past the page cache gives the bytes that writing through it does."""

from __future__ import annotations

import errno
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat.errors import StorageError
from loraformat.storage import PAGE_NBYTES, LocalStore, direct
from loraformat.storage.direct import memory_at, open_direct


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(direct, "LEAST_NBYTES", 1)
    (tmp_path / "try").write_bytes(b"")
    file = open_direct(str(tmp_path / "try"), 1, lambda offset, view: None)
    if file is None:
        pytest.skip("the file system of the test folder is not one to write to past the page cache")
    file.close()


def written(folder: Path, data: bytes, cuts: list[int], order: list[int], phases: list[bool]) -> bytes:
    """The file that pieces of `data` give, put there by several threads; some from memory that needs no copy."""
    places = [0, *sorted(cuts), len(data)]
    pieces = [(start, stop) for start, stop in itertools.pairwise(places) if start < stop]
    store = LocalStore(str(folder))
    with store.create("file", len(data)) as writer, ThreadPoolExecutor(3) as threads:

        def put(number: int) -> None:
            start, stop = pieces[number % len(pieces)]
            memory = memory_at(start % PAGE_NBYTES, stop - start) if phases[number % len(phases)] else data[start:stop]
            if isinstance(memory, memoryview):
                memory[:] = data[start:stop]
            writer.write_at(start, memory)

        list(threads.map(put, sorted(range(len(pieces)), key=lambda number: order[number % len(order)])))
    return (folder / "file").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    nbytes=st.integers(1, 5 * PAGE_NBYTES),
    cuts=st.lists(st.integers(0, 5 * PAGE_NBYTES), max_size=12),
    order=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    phases=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_pieces_in_any_order_make_the_file(
    tmp_path: Path, nbytes: int, cuts: list[int], order: list[int], phases: list[bool]
) -> None:
    data = os.urandom(nbytes)
    assert written(tmp_path, data, [min(cut, nbytes) for cut in cuts], order, phases) == data


def test_whole_pages_do_not_stay_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, through = os.pwrite, []

    def seen(fd: int, data: memoryview, offset: int) -> int:
        if not direct_flag(fd):
            through.append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr("loraformat.storage.direct.os.pwrite", seen)
    data = os.urandom(8 * PAGE_NBYTES + 10)
    assert written(tmp_path, data, [100], [0], [True]) == data
    assert sum(through) == PAGE_NBYTES + 10  # the page that is cut, and the ragged end


def direct_flag(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("first", [0, PAGE_NBYTES])
def test_a_disk_with_larger_pages_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    real = os.pwrite

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if direct_flag(fd):
            if offset >= first:
                raise OSError(errno.EINVAL, "Invalid argument")
            data = data[:PAGE_NBYTES]
        return real(fd, data, offset)

    monkeypatch.setattr("loraformat.storage.direct.os.pwrite", refuse)
    data = os.urandom(5 * PAGE_NBYTES + 7)
    assert written(tmp_path, data, [], [0], [True]) == data


def test_an_error_of_the_disk_is_told_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def broken(fd: int, data: memoryview, offset: int) -> int:
        if direct_flag(fd):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data, offset)

    monkeypatch.setattr("loraformat.storage.direct.os.pwrite", broken)
    with pytest.raises(StorageError, match="input/output error"):
        written(tmp_path, os.urandom(3 * PAGE_NBYTES), [], [0], [True])
    assert os.listdir(tmp_path) == ["try"]


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    written(tmp_path, os.urandom(3 * PAGE_NBYTES), [5], [0], [False])
    with pytest.raises(RuntimeError), LocalStore(str(tmp_path)).create("other", PAGE_NBYTES):
        raise RuntimeError
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_an_unknown_file_system_is_written_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_FILE_SYSTEMS", set())
    assert open_direct(str(tmp_path / "try"), 1 << 30, lambda offset, view: None) is None


def test_a_small_file_is_written_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LEAST_NBYTES", 100)
    assert open_direct(str(tmp_path / "try"), 99, lambda offset, view: None) is None
    assert open_direct(str(tmp_path / "try"), None, lambda offset, view: None) is None


def test_copies_go_past_the_cache_too(tmp_path: Path) -> None:
    data = os.urandom(4 * PAGE_NBYTES + 3)
    (tmp_path / "source").write_bytes(data)
    store = LocalStore(str(tmp_path))
    with store.create("file", len(data) + 5) as writer:
        writer.write_at(0, b"12345")
        writer.copy_from(store, "source", 0, 5, len(data))
    assert (tmp_path / "file").read_bytes() == b"12345" + data
