"""What every Store promises, over the table of stores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import LocalStore, MemoryStore, Store
from loraformat.storage.local.store import HiddenFolder

STORES: dict[str, Callable[[Path], Store]] = {
    "local": lambda folder: LocalStore(str(folder)),
    "hidden": lambda folder: HiddenFolder(str(folder)),
    "memory": lambda folder: MemoryStore(),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return STORES[request.param](tmp_path)


def put(store: Store, name: str, data: bytes, size: int | None = None) -> None:
    with store.create(name, size) as writer:
        writer.write(data)


def put_half(store: Store, name: str, error: type[BaseException]) -> None:
    with store.create(name, 9) as writer:
        writer.write(b"half")
        raise error


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.files() == {}


@pytest.mark.parametrize("size", [None, 5])
def test_what_is_written_is_read(store: Store, size: int | None) -> None:
    put(store, "a", b"hello", size)
    assert store.read("a") == b"hello"
    assert store.read("a", 1, 3) == b"ell"
    assert store.read("a", 4) == b"o"
    assert store.read("a", 5) == b""


def test_files_are_sorted_and_have_sizes(store: Store) -> None:
    for name, data in (("b", b"22"), ("a", b"1"), ("C", b"")):
        put(store, name, data)
    assert list(store.files().items()) == [("C", 0), ("a", 1), ("b", 2)]


def test_the_size_of_one_file_is_that_of_the_list(store: Store) -> None:
    put(store, "a", b"hello")
    assert store.size("a") == store.files()["a"] == 5
    with pytest.raises(StorageError, match="no such file"):
        store.size("b")


def test_a_file_appears_only_when_it_is_complete(store: Store) -> None:
    with store.create("a") as writer:
        writer.write(b"half")
        assert "a" not in store.files()
        with pytest.raises(StorageError, match="no such file"):
            store.read("a")
    assert "a" in store.files()


def test_a_failed_write_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        put_half(store, "a", KeyboardInterrupt)
    assert store.files() == {}


def test_a_failed_write_keeps_the_file_that_was_there(store: Store) -> None:
    put(store, "a", b"old")
    with pytest.raises(ZeroDivisionError):
        put_half(store, "a", ZeroDivisionError)
    assert store.read("a") == b"old"


def test_a_second_write_replaces_the_first(store: Store) -> None:
    put(store, "a", b"a long old text")
    assert store.read("a") == b"a long old text"
    put(store, "a", b"new")
    assert store.read("a") == b"new"


def test_positions_may_be_written_in_any_order(store: Store) -> None:
    with store.create("a", 9) as writer:
        writer.write_at(6, b"ghi")
        writer.write_at(0, bytearray(b"abc"))
        writer.write_at(3, memoryview(b"def"))
    assert store.read("a") == b"abcdefghi"


def test_threads_may_write_one_file(store: Store) -> None:
    blocks = [bytes([number]) * 1000 for number in range(64)]
    with store.create("a", 64_000) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: writer.write_at(1000 * number, blocks[number]), reversed(range(64))))
    assert store.read("a") == b"".join(blocks)


def test_threads_may_read_one_file(store: Store) -> None:
    put(store, "a", bytes(range(256)) * 100)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: store.read("a", start, 7), range(2000)))
    assert found == [bytes((start + step) % 256 for step in range(7)) for start in range(2000)]


def test_less_than_announced_is_an_error(store: Store) -> None:
    with pytest.raises(StorageError, match="expected 9 bytes, but 4 were written"), store.create("a", 9) as writer:
        writer.write(b"half")
    assert store.files() == {}


def test_read_into_fills_the_buffer(store: Store) -> None:
    put(store, "a", b"hello")
    buffer = bytearray(3)
    store.read_into("a", 2, buffer)
    assert buffer == b"llo"
    words = memoryview(bytearray(4)).cast("I")
    store.read_into("a", 1, words)
    assert bytes(words) == b"ello"


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 6), (5, 1), (6, 0), (-1, 2), (0, -1), (0, 1 << 60)])
def test_a_range_beyond_the_file_is_an_error(store: Store, offset: int, nbytes: int) -> None:
    put(store, "a", b"hello")
    with pytest.raises(StorageError):
        store.read("a", offset, nbytes)


def test_a_buffer_beyond_the_file_is_an_error(store: Store) -> None:
    put(store, "a", b"hello")
    with pytest.raises(StorageError, match="ends at byte 5"):
        store.read_into("a", 3, bytearray(3))


def test_an_absent_file_is_an_error(store: Store) -> None:
    with pytest.raises(StorageError, match="no such file"):
        store.read("absent")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\b", "a\0b"])
def test_a_name_is_one_path_component(store: Store, name: str) -> None:
    with pytest.raises(StorageError):
        store.read(name)
    with pytest.raises(StorageError), store.create(name):
        raise AssertionError("unreachable")


@pytest.mark.parametrize("from_local", [True, False])
def test_copy_from_puts_a_range_of_another_store(store: Store, tmp_path: Path, from_local: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    source: Store = LocalStore(str(other)) if from_local else MemoryStore()
    put(source, "s", bytes(range(256)) * 100)
    with store.create("a", 20_003) as writer:
        writer.copy_from(source, "s", 100, 3, 20_000)
        writer.write_at(0, b"abc")
    assert store.read("a") == b"abc" + (bytes(range(256)) * 100)[100:20_100]


def test_copy_from_beyond_the_end_is_an_error(store: Store, tmp_path: Path) -> None:
    put(store, "s", b"hello")
    with pytest.raises(StorageError), store.create("a", 6) as writer:
        writer.copy_from(store, "s", 0, 0, 6)
    assert list(store.files()) == ["s"]
