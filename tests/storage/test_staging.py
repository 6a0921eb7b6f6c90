"""stage: the output is there whole, or not at all, and nothing else is left."""

import fcntl
import multiprocessing
import os
import signal
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import stage


def write(target: Path, text: str = "new", *, overwrite: bool = False, inputs: tuple[str, ...] = ()) -> None:
    with stage(str(target), overwrite=overwrite, inputs=inputs) as store, store.create("a") as writer:
        writer.write(text.encode())


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    with stage(str(tmp_path / "out"), overwrite=False) as store:
        with store.create("a") as writer:
            writer.write(b"new")
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == {"a": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_files_are_made_durable_under_the_names_that_they_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    write(tmp_path / "out")
    assert synced[0] == "a"
    assert synced[-1] == tmp_path.name


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with stage(str(tmp_path / "out"), overwrite=False) as store, store.create("a") as writer:
            writer.write(b"new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "dead link"])
def test_an_existing_output_is_refused_and_replaced_on_request(tmp_path: Path, kind: str) -> None:
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if kind == "file":
        target.write_text("old")
    elif "folder" in kind:
        target.mkdir()
        if kind == "folder":
            (target / "old").write_text("old")
    else:
        target.symlink_to("elsewhere" if kind == "link" else "absent")
    with pytest.raises(StorageError, match=r"exists already .*--overwrite"):
        write(target)
    assert os.path.lexists(target)
    write(target, overwrite=True)
    assert content(target) == {"a": "new"}
    assert not target.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]
    assert content(elsewhere) == {"kept": "kept"}


def test_a_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), stage(str(tmp_path / "out"), overwrite=True):
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == {"a": "old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_overwrite_whose_rename_fails_keeps_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def unreliable(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", unreliable)
    with pytest.raises(StorageError, match="input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == {"a": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="exists already"), stage(str(tmp_path / "out"), overwrite=False):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


def test_inputs_are_never_written_to(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "a").write_text("old")
    (tmp_path / "link").symlink_to("models")
    targets = [base, base / "out", tmp_path / "models", tmp_path / "link", tmp_path / "link" / "base" / "out"]
    for target in targets:
        for given in (base, base / "a", tmp_path / "link" / "base"):
            if given == base / "a" and target.name == "out":
                continue
            with pytest.raises(StorageError, match="the input"):
                write(target, overwrite=True, inputs=(str(given),))
    assert content(base) == {"a": "old"}
    write(tmp_path / "out", inputs=(str(base), "hf://owner/name"))


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path, tmp_path.parent):
        with pytest.raises(StorageError, match="the current or the home folder"):
            write(target, overwrite=True)


def test_the_parent_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"create {tmp_path}/absent"):
        write(tmp_path / "absent" / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="does not exist"):
        write(tmp_path / "file" / "out")


def test_a_second_run_to_the_same_output_is_refused(tmp_path: Path) -> None:
    with stage(str(tmp_path / "out"), overwrite=False):
        with pytest.raises(StorageError, match=f"in use by pid {os.getpid()}"):
            write(tmp_path / "out")
        write(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def _stage_and_wait(target: str, ready: Connection) -> None:
    with stage(target, overwrite=True) as store, store.create("a") as writer:
        writer.write(b"half")
        ready.send(os.getpid())
        signal.pause()


def test_what_a_killed_run_left_is_reclaimed(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    near = tmp_path / ".other.loraformat-0.partial"
    near.mkdir()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_stage_and_wait, args=(str(tmp_path / "out"), there))
    process.start()
    assert here.poll(60)
    pid = here.recv()
    with pytest.raises(StorageError, match=f"in use by pid {pid}"):
        write(tmp_path / "out", overwrite=True)
    process.kill()
    process.join()
    assert len(os.listdir(tmp_path)) == 4
    assert content(tmp_path / "out") == {"a": "old"}
    write(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == {"a": "new"}
    assert sorted(os.listdir(tmp_path)) == [near.name, "out"]


def test_an_old_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """A run killed between the two renames of an overwrite, then one that fails."""
    aside = tmp_path / ".out.loraformat-0123-old.partial"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), stage(str(tmp_path / "out"), overwrite=True):
        raise ZeroDivisionError
    assert content(tmp_path / "out") == {"a": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_that_came_back_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / ".out.loraformat-0123-old.partial").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_of_a_dead_run_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".out.loraformat-lock.partial").write_text("12345\n")
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_without_a_number_is_still_a_lock(tmp_path: Path) -> None:
    with (tmp_path / ".out.loraformat-lock.partial").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="in use by pid unknown"):
            write(tmp_path / "out")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "a").stat().st_mode) == 0o644


def test_a_relative_output_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with stage("out/", overwrite=False) as store, store.create("a") as writer:
        os.chdir("/")
        writer.write(b"new")
    assert content(tmp_path / "out") == {"a": "new"}


def test_every_file_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def recorded_rename(source: str, target: str) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    write(tmp_path / "out")
    assert events == ["file", "folder", "rename", "folder"]


def unfinished(folder: Path, name: str = ".out.loraformat-0123abcd.partial") -> Path:
    left = folder / name
    left.mkdir()
    (left / "done").write_text("kept")
    (left / ".loraformat-note").write_text("ours")
    return left


def test_resume_gives_the_folder_of_a_killed_run_back(tmp_path: Path) -> None:
    unfinished(tmp_path)
    with stage(str(tmp_path / "out"), overwrite=False, resume=True) as store:
        assert list(store.files()) == ["done"]
        with store.create("a") as writer:
            writer.write(b"new")
    assert content(tmp_path / "out") == {"a": "new", "done": "kept"}
    assert os.listdir(tmp_path) == ["out"]


def test_resume_takes_the_newest_and_removes_the_others(tmp_path: Path) -> None:
    old = unfinished(tmp_path, ".out.loraformat-ffffffff.partial")
    (old / "old").write_text("old")
    os.utime(old, (1, 1))
    unfinished(tmp_path)
    with stage(str(tmp_path / "out"), overwrite=False, resume=True) as store:
        assert list(store.files()) == ["done"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("error", "is_kept"), [(KeyboardInterrupt, True), (OSError, False)])
def test_with_resume_a_signal_keeps_what_is_done_and_an_error_does_not(
    tmp_path: Path, error: type[BaseException], is_kept: bool
) -> None:
    def interrupted() -> None:
        with stage(str(tmp_path / "out"), overwrite=False, resume=True) as store, store.create("a") as writer:
            writer.write(b"new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert len(os.listdir(tmp_path)) == is_kept
    assert not (tmp_path / "out").exists()
