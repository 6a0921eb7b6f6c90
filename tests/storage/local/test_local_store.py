"""LocalStore: what is peculiar to a real file system."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import LocalStore, open_store, require_space


def test_one_file_is_a_store_with_one_entry(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"22")
    store = open_store(str(tmp_path / "a"))
    assert store.files() == {"a": 1}
    assert store.read("a") == b"1"
    with pytest.raises(StorageError, match="no such file"):
        store.read("b")


@pytest.mark.parametrize("uri", ["ftp://host/x", "https://host/x", "hdfs://host/x"])
def test_a_scheme_is_refused_by_name(uri: str) -> None:
    with pytest.raises(StorageError, match="not supported in this version") as caught:
        open_store(uri)
    assert caught.value.where == uri


@pytest.mark.parametrize("uri", ["absent", "absent/deep", "a\0b", ""])
def test_a_path_that_is_not_there(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError):
        open_store(uri)


def test_a_missing_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        open_store(str(tmp_path / "absent"))


def test_only_regular_files_are_listed_and_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "file").write_bytes(b"x")
    store = open_store(str(tmp_path))
    assert list(store.files()) == ["file"]
    for name in ("folder", "fifo", "zero", "loop", "nowhere"):
        with pytest.raises(StorageError):
            store.read(name)


def test_a_fifo_or_device_is_no_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(StorageError, match="neither a folder nor a regular file"):
            open_store(str(path))


def test_links_of_a_hub_cache_are_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "etag").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/etag")
    store = open_store(str(snapshot))
    assert store.files() == {"model.safetensors": 7}
    assert store.read("model.safetensors") == b"weights"


def test_a_file_that_changes_between_two_reads_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    store = open_store(str(tmp_path))
    store.read("a")
    (tmp_path / "a").write_bytes(b"after!!")
    with pytest.raises(StorageError, match="changed while it was in use"):
        store.read("a")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_store(str(tmp_path)).create("a") as writer:
            writer.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_an_error_of_the_system_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="no space") as caught, open_store(str(tmp_path)).create("a") as writer:
        writer.write(b"x")
    assert caught.value.where == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_shows_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="no space"), open_store(str(tmp_path)).create("a", 5):
        raise AssertionError("unreachable")
    assert list(tmp_path.iterdir()) == []


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, preadv, pwrite = os.pread, os.preadv, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: pread(fd, min(nbytes, 3), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    store = open_store(str(tmp_path))
    with store.create("a") as writer:
        writer.write(b"0123456789")
    buffer = bytearray(10)
    store.read_into("a", 0, buffer)
    assert store.read("a") == bytes(buffer) == b"0123456789"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_copying_falls_back_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    (tmp_path / "s").write_bytes(b"0123456789")
    store = open_store(str(tmp_path))
    with store.create("a", 4) as writer:
        writer.copy_from(store, "s", 3, 0, 4)
    assert store.read("a") == b"3456"


def test_copying_goes_on_after_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, x, y: copy(a, b, min(n, 3), x, y))
    (tmp_path / "s").write_bytes(b"0123456789")
    store = open_store(str(tmp_path))
    with store.create("a", 8) as writer:
        writer.copy_from(store, "s", 2, 0, 8)
    assert store.read("a") == b"23456789"


def test_copying_to_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "s").write_bytes(b"0123456789")
    store = open_store(str(tmp_path))
    with pytest.raises(StorageError, match="no space"), store.create("a", 8) as writer:
        writer.copy_from(store, "s", 2, 0, 8)


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    store = LocalStore(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        store.read("a")
        with pytest.raises(StorageError):
            store.read("a", 0, 9)
        with store.create("b") as writer:
            writer.write(b"x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_require_space_compares_with_the_file_system(tmp_path: Path) -> None:
    require_space(str(tmp_path / "absent" / "deep"), 1)
    with pytest.raises(StorageError, match="no space: 1152921504606846976 bytes are needed"):
        require_space(str(tmp_path / "out"), 1 << 60)


def test_a_file_that_cannot_be_cloned_is_left_to_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    (tmp_path / "a").write_bytes(b"content")
    store = LocalStore(str(tmp_path))
    with store.create("b", 7) as writer:
        assert not writer.clone_from(store, "a")
        writer.copy_from(store, "a", 0, 0, 7)
    assert store.read("b") == b"content"


def test_a_removed_file_is_gone_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    store = LocalStore(str(tmp_path))
    before = store.identity("a")
    store.remove("a")
    store.remove("a")
    (tmp_path / "a").write_bytes(b"other content")
    assert store.identity("a") != before


def test_links_are_followed_inside_the_folder_and_into_the_cache_it_belongs_to(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "etag").write_bytes(b"config")
    (snapshot / "config.json").symlink_to("../../blobs/etag")
    (snapshot / "again.json").symlink_to("config.json")
    store = LocalStore(str(snapshot))
    assert store.read("config.json") == store.read("again.json") == b"config"


def test_a_link_that_leaves_the_folder_is_followed_for_weights_only(tmp_path: Path) -> None:
    folder, secret = tmp_path / "adapter", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(b"mine")
    for name in ("tokenizer.json", "README.md", "model.safetensors"):
        (folder / name).symlink_to(secret)
    store = LocalStore(str(folder))
    for name in ("tokenizer.json", "README.md"):
        with pytest.raises(StorageError, match="leaves the folder"):
            store.read(name)
        with pytest.raises(StorageError, match="leaves the folder"), store.descriptor(name):
            pass
    assert store.read("model.safetensors") == b"mine"


def identity(path: Path) -> tuple[int, ...]:
    """What something is and when it was changed; reading a link may alter its time of access."""
    status = os.lstat(path)
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink


@pytest.mark.parametrize("kind", ["a FIFO", "a symbolic link", "a folder", "a socket"])
def test_a_file_replaces_nothing_but_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As root, a report to /dev/null would otherwise put a file in the place of the device."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "out"
    if kind == "a FIFO":
        os.mkfifo(target)
    elif kind == "a symbolic link":
        (tmp_path / "kept").write_text("kept")
        target.symlink_to("kept")
    elif kind == "a folder":
        target.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("out")
    before, names = identity(target), sorted(os.listdir(tmp_path))
    with pytest.raises(StorageError, match=f"{kind} exists there"), LocalStore(str(tmp_path)).create("out") as writer:
        writer.write(b"new")
    assert identity(target) == before
    assert sorted(os.listdir(tmp_path)) == names
