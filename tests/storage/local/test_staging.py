"""stage: the output is there whole, or not at all, and nothing else is left."""

import fcntl
import multiprocessing
import os
import signal
import socket
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import MARKER, OWN_PREFIX, LocalStore, MemoryStore, permissions_for, stage


def write(target: Path, text: str = "new", *, overwrite: bool = False, inputs: tuple[str, ...] = ()) -> None:
    with stage(str(target), overwrite=overwrite, inputs=inputs, names={"a"}) as store, store.create("a") as writer:
        writer.write(text.encode())


def write_text(store: LocalStore, name: str, text: str) -> None:
    with store.create(name) as writer:
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
    assert [name.startswith(OWN_PREFIX) for name in synced[:2]] == [True, False]
    assert synced[1] == "a"
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


@pytest.mark.parametrize("names", [[], ["a"]])
def test_an_earlier_output_is_refused_and_replaced_on_request(tmp_path: Path, names: list[str]) -> None:
    """An empty folder, and one that holds nothing but files that this run writes."""
    target = tmp_path / "out"
    target.mkdir()
    for name in names:
        (target / name).write_text("old")
    with pytest.raises(StorageError, match=r"exists already .*--overwrite"):
        write(target)
    write(target, overwrite=True)
    assert content(target) == {"a": "new"}
    assert os.listdir(tmp_path) == ["out"]


def _made(path: Path, kind: str) -> None:
    """Something at a path that no run made."""
    if kind == "a file":
        path.write_text("kept")
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))
    elif kind == "a symbolic link":
        path.symlink_to("elsewhere")
    elif kind == "a dead link":
        path.symlink_to("absent")
    elif kind == "a folder of others":
        path.mkdir()
        (path / "a").write_text("kept")
        (path / "thesis.tex").write_text("kept")
    elif kind == "a folder of folders":
        (path / "a").mkdir(parents=True)
    else:
        path.mkdir()
        (path / "a").symlink_to("../elsewhere/kept")


STRANGE = ["a file", "a FIFO", "a socket", "a symbolic link", "a dead link"]


def identity(path: Path) -> tuple[int, ...]:
    """What something is and when it was changed; reading a link may alter its time of access."""
    status = os.lstat(path)
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink


@pytest.mark.parametrize("kind", [*STRANGE, "a folder of others", "a folder of folders", "a folder of links"])
def test_what_is_no_output_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    _made(target, kind)
    before = identity(target)
    monkeypatch.chdir("/")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="not replaced" if overwrite or kind in STRANGE else "exists already"):
            write(target, overwrite=overwrite)
    assert identity(target) == before
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]
    assert content(elsewhere) == {"kept": "kept"}


@pytest.mark.parametrize("others", [{}, {"notes": "kept"}])
def test_an_earlier_output_is_replaced_and_nothing_else_with_it(tmp_path: Path, others: dict[str, str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name, text in {"old": "old", **others}.items():
        (target / name).write_text(text)

    def replaced() -> None:
        with stage(
            str(target), overwrite=True, written=lambda path: {"old"} if path == str(target) else set()
        ) as store:
            write_text(store, "a", "new")

    if others:
        with pytest.raises(StorageError, match="holds notes, which no earlier run of this command wrote"):
            replaced()
    else:
        replaced()
    assert content(target) == ({"old": "old", **others} if others else {"a": "new"})


@pytest.mark.parametrize("target", ["/", "/proc"])
def test_the_root_and_mount_points_are_not_replaced(target: str) -> None:
    with pytest.raises(StorageError, match=r"root of the file system|mount point"):
        write(Path(target), overwrite=True)


def test_a_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), stage(str(tmp_path / "out"), overwrite=True, names={"a"}):
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
    with stage(target, overwrite=True, names={"a"}) as store, store.create("a") as writer:
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


def put_aside(folder: Path) -> None:
    """As a run leaves an old output that is killed between the two renames of an overwrite."""
    old = folder / ".out.loraformat-01234567-old.partial" / "old"
    old.mkdir(parents=True)
    (old / "a").write_text("old")
    (old.parent / MARKER).write_text("out")


def test_an_old_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """A run killed between the two renames of an overwrite, then one that fails."""
    put_aside(tmp_path)
    with pytest.raises(ZeroDivisionError), stage(str(tmp_path / "out"), overwrite=True, names={"a"}):
        raise ZeroDivisionError
    assert content(tmp_path / "out") == {"a": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_that_came_back_is_not_replaced_unasked(tmp_path: Path) -> None:
    put_aside(tmp_path)
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
    assert events == ["file", "file", "folder", "rename", "folder"]  # the first is what marks the folder


def unfinished(folder: Path, name: str = ".out.loraformat-0123abcd.partial") -> Path:
    left = folder / name
    left.mkdir()
    (left / "done").write_text("kept")
    (left / ".loraformat-note").write_text("ours")
    (left / MARKER).write_text("out")
    return left


@pytest.mark.parametrize("resume", [False, True])
def test_what_runs_to_other_outputs_left_stays(tmp_path: Path, resume: bool) -> None:
    """Also where the other output is called like a leftover of this one."""
    others = [
        unfinished(tmp_path, name)
        for name in (".out.loraformat-v2.loraformat-0123abcd.partial", ".out.loraformat-01234567.partial")
    ]
    (others[0] / MARKER).write_text("out.loraformat-v2")
    (others[1] / MARKER).write_text("another")
    foreign = tmp_path / ".out.loraformat-89abcdef.partial"
    foreign.mkdir()
    (foreign / "mine").write_text("kept")
    (tmp_path / ".out.loraformat-v2.loraformat-lock.partial").write_text("1")
    before = sorted(os.listdir(tmp_path))
    with stage(str(tmp_path / "out"), overwrite=False, resume=resume) as store:
        assert list(store.files()) == []
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])


def test_an_unfinished_output_that_is_removed_is_told(tmp_path: Path) -> None:
    unfinished(tmp_path)
    told: list[int] = []
    with stage(str(tmp_path / "out"), overwrite=False, on_cleared=told.append):
        pass
    assert told == [len("kept") + len("ours") + len("out")]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("permissions", "modes"), [(0o777, (0o755, 0o644)), (0o770, (0o750, 0o640)), (0o700, (0o700, 0o600))]
)
def test_an_output_is_as_private_as_it_is_asked_to_be(tmp_path: Path, permissions: int, modes: tuple[int, int]) -> None:
    before = os.umask(0o022)
    try:
        with stage(str(tmp_path / "out"), overwrite=False, permissions=permissions) as store:
            with store.create("a") as writer:
                writer.write(b"new")
            (partial,) = tmp_path.glob(".out.loraformat-????????.partial")
            assert stat.S_IMODE(partial.stat().st_mode) == modes[0]
    finally:
        os.umask(before)
    found = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", tmp_path / "out" / "a")]
    assert tuple(found) == modes


@pytest.mark.parametrize(
    ("folder", "file", "granted"),
    [(0o755, 0o644, 0o777), (0o755, 0o600, 0o700), (0o700, 0o644, 0o700), (0o755, 0o640, 0o770), (0o750, 0o644, 0o770)],
)
def test_an_output_is_as_private_as_its_inputs(tmp_path: Path, folder: int, file: int, granted: int) -> None:
    place = tmp_path / "in"
    place.mkdir()
    for name in ("open", "private"):
        (place / name).write_text("x")
        (place / name).chmod(0o644)
    (place / "private").chmod(file)
    place.chmod(folder)
    store = LocalStore(str(place))
    assert permissions_for([(store, ["open", "private"])], str(tmp_path / "out")) == granted
    assert permissions_for([(MemoryStore(), ["x"])], str(tmp_path / "out")) == 0o777


@pytest.mark.parametrize(
    ("folder", "file", "granted"), [(0o755, 0o640, 0o700), (0o750, 0o644, 0o700), (0o755, 0o644, 0o777)]
)
def test_another_group_than_that_of_the_inputs_reads_only_what_all_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: int, file: int, granted: int
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    (place / "a").write_text("x")
    (place / "a").chmod(file)
    place.chmod(folder)
    group = place.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: group + 1)
    store = LocalStore(str(place))
    assert permissions_for([(store, ["a"])], str(tmp_path / "out")) == granted
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2755)  # what is made in it gets its group
    assert permissions_for([(store, ["a"])], str(shared / "out")) == (0o777 if granted == 0o777 else 0o770)


def test_the_folder_that_a_link_leads_into_counts(tmp_path: Path) -> None:
    """The blobs of a cache of the Hub, say."""
    repository = tmp_path / "models"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "c").mkdir(parents=True)
    (repository / "blobs" / "a").write_text("x")
    (repository / "blobs" / "a").chmod(0o644)
    (repository / "snapshots" / "c" / "a").symlink_to("../../blobs/a")
    (repository / "blobs").chmod(0o700)
    store = LocalStore(str(repository / "snapshots" / "c"))
    assert permissions_for([(store, ["a"])], str(tmp_path / "out")) == 0o700


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a link"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_leftover_with_another_kind_of_marker_stays(tmp_path: Path, kind: str, resume: bool) -> None:
    left = unfinished(tmp_path)
    (left / MARKER).unlink()
    if kind == "a folder":
        (left / MARKER).mkdir()
    elif kind == "a FIFO":
        os.mkfifo(left / MARKER)
    else:
        (tmp_path / "name").write_text("out")
        (left / MARKER).symlink_to(tmp_path / "name")
    held = os.open(left / MARKER, os.O_RDWR) if kind == "a FIFO" else None
    try:
        with stage(str(tmp_path / "out"), overwrite=False, resume=resume) as store:
            write_text(store, "a", "new")
    finally:
        if held is not None:
            os.close(held)
    assert content(tmp_path / "out") == {"a": "new"}
    assert (left / "done").read_text() == "kept"


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_leftover_that_another_user_made_is_neither_used_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_empty: bool, resume: bool
) -> None:
    """In a folder that several may write to, it holds what somebody else chose."""
    left = unfinished(tmp_path)
    if is_empty:
        for path in left.iterdir():
            path.unlink()
    before = os.lstat(left)
    monkeypatch.setattr(os, "geteuid", lambda: before.st_uid + 1)
    with stage(str(tmp_path / "out"), overwrite=False, resume=resume) as store:
        write_text(store, "a", "new")
    assert content(tmp_path / "out") == {"a": "new"}
    assert os.lstat(left) == before


def test_a_leftover_becomes_as_private_as_the_run_that_goes_on_with_it(tmp_path: Path) -> None:
    left = unfinished(tmp_path)
    left.chmod(0o755)
    (left / "done").chmod(0o644)
    with stage(str(tmp_path / "out"), overwrite=False, permissions=0o700, resume=True) as store:
        assert [stat.S_IMODE(path.stat().st_mode) for path in (left, left / "done")] == [0o700, 0o600]
        write_text(store, "a", "new")
    assert (tmp_path / "out" / "done").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["a second name", "a folder", "a FIFO", "a link", "other content"])
def test_what_is_no_lock_is_neither_emptied_nor_removed(tmp_path: Path, kind: str) -> None:
    lock, kept = tmp_path / ".out.loraformat-lock.partial", tmp_path / "kept"
    kept.write_text("1")
    if kind == "a second name":
        os.link(kept, lock)
    elif kind == "a folder":
        lock.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(lock)
    elif kind == "a link":
        lock.symlink_to(kept)
    else:
        lock.write_text("what somebody wrote, and a lock is not")
    before = os.lstat(lock)
    with pytest.raises(StorageError, match="in the place of its lock"):
        write(tmp_path / "out")
    assert os.lstat(lock) == before
    assert kept.read_text() == "1"
    assert not (tmp_path / "out").exists()


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
