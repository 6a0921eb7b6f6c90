"""gs:// and az:// addresses, over a file system of fsspec in memory: the services themselves are not asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import loraformat
from loraformat.errors import MissingExtra, StorageError
from loraformat.storage import open_store
from loraformat.storage.remote import filesystems

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
BYTES = bytes(range(256)) * 2048


class Bucket(MemoryFileSystem):
    """A service in memory that answers as a test wants it to."""

    protocol = ("gs",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    serves_ranges = True
    cut = 0
    asked: ClassVar[list[tuple[int | None, int | None]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        Bucket.asked.append((start, end))
        data = bytes(super().cat_file(path, *((start, end) if self.serves_ranges else ())))
        if Bucket.cut:
            Bucket.cut -= 1
            return data[:-1]
        return data


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(filesystems, "_PAUSE_S", 0.001)
    fsspec.register_implementation("gs", Bucket, clobber=True)
    Bucket.store, Bucket.pseudo_dirs, Bucket.asked = {}, [""], []
    Bucket.serves_ranges, Bucket.cut = True, 0
    made = Bucket()
    made.pipe("/models/base/a", BYTES)
    made.pipe("/models/base/b", b"b")
    made.pipe("/models/base/sub/c", b"c")
    return made


def put(bucket: Bucket, prefix: str, folder: Path) -> None:
    for path in folder.iterdir():
        bucket.pipe(f"{prefix}/{path.name}", path.read_bytes())


def test_a_folder_its_files_and_ranges_of_them(bucket: Bucket) -> None:
    found = open_store("gs://models/base/")
    assert (found.files(), found.folders()) == ({"a": len(BYTES), "b": 1}, ("sub",))
    assert found.read("a", 300_000, 5) == BYTES[300_000:300_005]
    assert found.read("a", 10, 20) == BYTES[10:30]
    assert found.read("a", 40, 20) == BYTES[40:60]
    assert Bucket.asked == [(300_000, 300_005), (0, 131072)]
    assert open_store("gs://models/base/b").is_single_file


def test_a_service_without_ranges_is_an_error_and_no_wrong_bytes(bucket: Bucket) -> None:
    Bucket.serves_ranges = False
    found = open_store("gs://models/base")
    assert found.read("b") == b"b"
    with pytest.raises(StorageError, match=r"gs://models/base/a: .* does not support range requests"):
        found.read("a", 300_000, 5)


def test_an_answer_that_is_cut_is_asked_for_again(bucket: Bucket) -> None:
    Bucket.cut = 2
    assert open_store("gs://models/base").read("a", 300_000, 5) == BYTES[300_000:300_005]
    Bucket.cut = 10**6
    with pytest.raises(StorageError, match="4 bytes came"):
        open_store("gs://models/base").read("a", 300_000, 5)


def test_a_merge_is_that_of_the_same_files_here(bucket: Bucket, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "minigpt" / "base", FIXTURES / "minigpt" / "lora_adapter"
    put(bucket, "/models/minigpt", base)
    put(bucket, "/models/lora", adapter)
    loraformat.merge("gs://models/minigpt", ["gs://models/lora"], tmp_path / "remote", alpha=1.0)
    loraformat.merge(base, [adapter], tmp_path / "local", alpha=1.0)
    found = {path.name: path.read_bytes() for path in (tmp_path / "remote").iterdir()}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def test_nothing_is_written_there(bucket: Bucket, tmp_path: Path) -> None:
    adapter = FIXTURES / "minigpt" / "lora_adapter"
    with pytest.raises(StorageError, match="outputs cannot be written there"):
        loraformat.convert(adapter, "gs://models/out", to="peft", base=FIXTURES / "minigpt" / "base", alpha=1.0)


def test_what_is_not_there_is_said(bucket: Bucket) -> None:
    with pytest.raises(StorageError, match="gs://models/none: no such file or folder"):
        open_store("gs://models/none")


def test_an_adapter_of_fsspec_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> None:
        raise ImportError(uri)

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"az:// needs adlfs \(pip install adlfs\)"):
        open_store("az://container/base")
