"""What the operating system cannot do costs time, and changes no byte."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from merger.checkpoints import adapter_folder, config, save_base, weights

import loraformat
from loraformat.errors import StorageError
from loraformat.storage import LocalStore, platform, stage
from loraformat.storage.platform import Plain, Posix, is_same_file

SHAPES = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.1.up_proj.weight": (130, 24)}


class Recorder(Posix):
    """A toy platform: knows what it was asked for, and refuses locks if told to."""

    def __init__(self, *, is_locked: bool = False) -> None:
        self.calls: list[str] = []
        self._is_locked = is_locked

    def lock(self, fd: int, *, shared: bool = False) -> None:
        self.calls.append("lock")
        if self._is_locked:
            raise BlockingIOError
        super().lock(fd, shared=shared)

    def reserve(self, fd: int, nbytes: int) -> None:
        self.calls.append("reserve")
        super().reserve(fd, nbytes)

    def free_nbytes(self, folder: str) -> int:
        del folder
        return 10


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_system_with_nothing_but_files_gives_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=2)
    change = adapter_folder(tmp_path / "change", SHAPES)
    loraformat.merge(base, [change], tmp_path / "here")
    monkeypatch.setattr(platform, "PLATFORM", Plain())
    loraformat.merge(base, [change], tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(tmp_path / "here")
    left = tmp_path / f".other.loraformat-{'0' * 8}.partial"
    left.mkdir()
    loraformat.merge(base, [change], tmp_path / "other")
    assert not left.exists()


def test_locks_room_and_space_are_asked_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(platform, "PLATFORM", recorder)
    with stage(str(tmp_path / "out"), overwrite=False) as store, store.create("a", 4) as writer:
        writer.write(b"1234")
    assert recorder.calls == ["lock", "reserve"]
    assert (tmp_path / "out" / "a").read_bytes() == b"1234"
    base = save_base(tmp_path / "base", weights(), config())
    with pytest.raises(StorageError, match="10 are free"):
        loraformat.merge(base, [adapter_folder(tmp_path / "change", SHAPES)], tmp_path / "merged")
    monkeypatch.setattr(platform, "PLATFORM", Recorder(is_locked=True))
    with pytest.raises(StorageError, match="in use by pid"), stage(str(tmp_path / "new"), overwrite=False):
        pass


def test_a_copy_inside_the_kernel_is_the_copy_through_memory(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "source").write_bytes(data)
    for number, each in enumerate((Posix(), Plain())):
        with (tmp_path / "source").open("rb") as source, (tmp_path / f"out{number}").open("w+b") as out:
            done = each.copy_range(out.fileno(), source.fileno(), 1000, 0, 250_000)
            assert done in (0, 250_000)
            out.seek(0)
            assert out.read(done) == data[1000 : 1000 + done]
    store = LocalStore(str(tmp_path))
    with store.create("copy", 250_000) as writer:
        writer.copy_from(store, "source", 1000, 0, 250_000)
    assert (tmp_path / "copy").read_bytes() == data[1000:251_000]


def test_bytes_are_read_in_place_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    monkeypatch.delattr(os, "preadv")
    buffer = bytearray(7)
    LocalStore(str(tmp_path)).read_into("a", 90, buffer)
    assert buffer == bytes(range(90, 97))
    with pytest.raises(StorageError):
        LocalStore(str(tmp_path)).read_into("a", 95, buffer)


def refusing_sync(monkeypatch: pytest.MonkeyPatch, number: int, *, of_folders: bool) -> None:
    """Let the system answer with an error where a folder, or a file, is made durable."""
    fsync = os.fsync

    def answered(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", answered)


def write_out(folder: Path) -> None:
    with stage(str(folder / "out"), overwrite=False) as store, store.create("a", 4) as writer:
        writer.write(b"1234")


UNSUPPORTED = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS")


@pytest.mark.parametrize(
    ("name", "of_folders"),
    [*((name, True) for name in (*UNSUPPORTED, "EBADF")), *((name, False) for name in UNSUPPORTED)],
)
def test_an_output_is_kept_where_folders_or_files_cannot_be_synced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, of_folders: bool
) -> None:
    """FUSE, SMB and other network file systems."""
    refusing_sync(monkeypatch, getattr(errno, name), of_folders=of_folders)
    write_out(tmp_path)
    assert contents(tmp_path / "out") == {"a": b"1234"}


@pytest.mark.parametrize("name", ["EISDIR", "EACCES", "EPERM", "ENOTSUP"])
def test_an_output_is_kept_where_folders_cannot_be_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, number = os.open, getattr(errno, name)

    def answered(path: str, flags: int, mode: int = 0o777, **named: int) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, mode, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", answered)
        write_out(tmp_path)
    assert contents(tmp_path / "out") == {"a": b"1234"}


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_folder_that_the_disk_does_not_take_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing_sync(monkeypatch, getattr(errno, name), of_folders=True)
    with pytest.raises(StorageError) as caught:
        write_out(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == getattr(errno, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "EBADF"])
def test_a_file_that_the_disk_does_not_take_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path))
    refusing_sync(monkeypatch, getattr(errno, name), of_folders=False)
    with pytest.raises(StorageError) as caught, store.create("a", 4) as writer:
        writer.write(b"1234")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == getattr(errno, name)
    assert os.listdir(tmp_path) == []


def test_what_has_no_identity_is_the_same_as_nothing(tmp_path: Path) -> None:
    """NUL, the console and pipes of Windows."""
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    os.link(tmp_path / "a", tmp_path / "other name")
    a, b, other = (os.stat(tmp_path / name) for name in ("a", "b", "other name"))
    nothing = os.stat_result((stat.S_IFCHR, *[0] * 9))
    assert is_same_file(a, other)
    assert not is_same_file(a, b)
    assert not is_same_file(nothing, nothing)
