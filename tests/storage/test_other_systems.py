"""Systems that are not Linux: what they lack is taken away here, and the verbs still do what they do."""

from __future__ import annotations

import errno
import ntpath
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import pytest
from click.testing import CliRunner
from storage import windows_locks

import loraformat
from loraformat import cli, machine
from loraformat.errors import StorageError, UnsupportedMachine, UsageError
from loraformat.jobs.inputs.settings import PathIgnores, Settings
from loraformat.storage import LocalStore, join, platform, stage, uri_of
from loraformat.storage.locations import _path_of
from loraformat.storage.platform import Plain, Platform, Posix, Windows

FIXTURES = Path(__file__).parents[2] / "fixtures"

# Runs before anything is imported: a Python as on Windows, as far as this one can be made like it.
LIKE_WINDOWS = """
import mmap, os, signal, stat, sys

sys.path.insert(0, sys.argv[2])
import windows_locks
del sys.path[0]
sys.modules["msvcrt"] = windows_locks
os.close = windows_locks.close

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del signal.SIGHUP, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
signal.SIGBREAK = signal.SIGUSR1  # another that ends a process which does not handle it
for name in (
    "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "copy_file_range", "fchmod",
    "geteuid", "getegid", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "statvfs",
):
    delattr(os, name)
for found in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
    found.clear()

listed = os.scandir


def opened():
    "Files that are open or in memory."
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
    with open("/proc/self/maps") as maps:
        yield from (line.split(None, 5)[-1].strip() for line in maps)


def refusing(call):
    "A call that Windows refuses for files that are open."
    def checked(path, *more, **named):
        for each in (path, *more):
            if isinstance(each, str) and any((name + "/").startswith(os.path.abspath(each) + "/") for name in opened()):
                raise PermissionError(13, "is open", each)
        return call(path, *more, **named)
    return checked


for name in ("remove", "rename", "replace", "rmdir", "unlink"):
    setattr(os, name, refusing(getattr(os, name)))

simple_rename = os.rename


def rename(old, new):
    if os.path.lexists(new):
        raise FileExistsError(17, "is there", new)
    simple_rename(old, new)


os.rename = rename


def without_identity(call):
    "Neither devices nor pipes have one on Windows."
    def found(*more, **named):
        status = call(*more, **named)
        is_of_disk = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)
        return status if is_of_disk else os.stat_result((status.st_mode, *[0] * 9))
    return found


for name in ("fstat", "lstat", "stat"):
    setattr(os, name, without_identity(getattr(os, name)))


class Entry:
    "As os.scandir has it on Windows: without the identity of the file."
    def is_junction(self):  # asked for by shutil.rmtree since Python 3.12
        return False

    def __init__(self, entry):
        self._entry, self.name, self.path = entry, entry.name, entry.path
        self.is_file, self.is_dir, self.is_symlink = entry.is_file, entry.is_dir, entry.is_symlink

    def stat(self, **named):
        status = self._entry.stat(**named)
        return os.stat_result((status.st_mode, 0, 0, 0, *status[4:]))


class Listing:
    def __init__(self, path):
        self._all = listed(path)
    def __enter__(self):
        return self
    def __exit__(self, *raised):
        self._all.close()
    def __iter__(self):
        return self
    def __next__(self):
        return Entry(next(self._all))
    def close(self):
        self._all.close()


os.scandir = Listing

from loraformat.storage import platform

platform.PLATFORM = platform.Windows()
"""

# A share without locks, of which a folder cannot be synced: one of the two numbers that mean it, as macOS has them.
LIKE_A_SHARE_OF_MACOS = """
import errno, fcntl, os, stat, sys

errno.ENOTSUP, errno.EOPNOTSUPP = 45, 102
for name in ("O_DIRECT", "copy_file_range", "posix_fallocate"):
    delattr(os, name)


def refuse(*more):
    raise OSError(int(sys.argv[2]), "Operation not supported")


sync = os.fsync
fcntl.flock = refuse
os.fsync = lambda fd: refuse() if stat.S_ISDIR(os.fstat(fd).st_mode) else sync(fd)
"""

# A network drive of Windows on which no file has a number.
WITHOUT_IDENTITY = """
DRIVE = int(os.environ.get("DRIVE", "0"))  # a drive may have a number though its files have none
TIMES = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize")


def numberless(call):
    def found(*more, **named):
        status = call(*more, **named)
        times = {name: getattr(status, name) for name in TIMES}
        return os.stat_result((status.st_mode, 0, DRIVE, *status[3:]), times)
    return found


for name in ("fstat", "lstat", "stat"):
    setattr(os, name, numberless(getattr(os, name)))
os.path.ismount = lambda path: path == "/"  # Windows looks for volumes instead
"""

TOUR = """
from loraformat.cli import main

for line in sys.argv[1].splitlines():
    try:
        main(line.split(), prog_name="loraformat", standalone_mode=True)
    except SystemExit as left:
        if left.code:
            sys.exit(f"{line}: {left.code}")
"""

VERBS = """inspect {minigpt}/lora_adapter --norms
validate {peft} --deep
convert {minigpt}/lora_adapter --to peft --alpha 1.0 -o converted
merge {minigpt}/base converted -o merged
merge {minigpt}/base converted -o merged --overwrite
verify merged"""


# Ctrl+Break while a weight file of an output is opened.
BREAKING = """
def strike(event, given, done=[]):
    if event == "open" and ".partial/model" in os.fsdecode(str(given[0])) and not done:
        done.append(True)
        signal.raise_signal(signal.SIGBREAK)


sys.addaudithook(strike)
"""


def run(system: str, lines: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The verbs on a system, up to the first that fails."""
    text = lines.format(minigpt=FIXTURES / "minigpt", peft=FIXTURES / "good" / "peft" / "rslora")
    command = [sys.executable, "-c", system + TOUR, text, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def tour(system: str, lines: str, folder: Path, *arguments: str) -> str:
    """What the verbs print on a system, having done what they should."""
    done = run(system, lines, folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_merged(folder: Path) -> None:
    """The merged model is the one of this system, and nothing else is left beside it."""
    assert sorted(os.listdir(folder)) == ["converted", "merged"]
    loraformat.merge(FIXTURES / "minigpt" / "base", [folder / "converted"], folder / "here")
    assert (folder / "merged" / "model.pt").read_bytes() == (folder / "here" / "model.pt").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
def test_the_verbs_need_nothing_that_windows_lacks(tmp_path: Path) -> None:
    """No fcntl, SIGHUP, pread or O_DIRECT; open files can be neither renamed nor removed, a rename replaces nothing.

    Bytes are locked as there: a lock that is not given back before its file is closed ends the process.
    """
    tour(LIKE_WINDOWS, VERBS, tmp_path, str(Path(__file__).parent))
    check_merged(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
def test_files_that_another_library_maps_can_be_renamed_on_windows(tmp_path: Path) -> None:
    """The check of a merge opens what it has written with the safetensors library, which maps it into memory."""
    lines = """convert {minigpt}/lora_adapter --to peft --alpha 1.0 -o converted
merge {minigpt}/base converted -o merged --container safetensors --verify full
merge {minigpt}/base converted -o merged --container safetensors --verify full --overwrite
verify merged"""
    tour(LIKE_WINDOWS, lines, tmp_path, str(Path(__file__).parent))
    assert sorted(os.listdir(tmp_path)) == ["converted", "merged"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
def test_ctrl_break_on_windows_leaves_nothing(tmp_path: Path) -> None:
    line = "merge {minigpt}/base {minigpt}/lora_adapter --alpha 1.0 -o merged"
    broken = run(LIKE_WINDOWS + BREAKING, line, tmp_path, str(Path(__file__).parent))
    said = broken.stderr.splitlines()
    assert said[-2] == "interrupted: no partial output is left"
    assert said[-1].endswith(f"-o merged: {128 + signal.SIGUSR1}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no device that takes a report")
def test_a_report_to_nul_does_not_go_to_standard_output(tmp_path: Path) -> None:
    """On Windows both have the same identity, which is none."""
    printed = tour(LIKE_WINDOWS, "validate {peft} --report json=/dev/null", tmp_path, str(Path(__file__).parent))
    assert "OK" in printed
    assert '"job"' not in printed


@pytest.mark.parametrize("refusal", ["45", "102"])
def test_the_verbs_write_to_a_share_of_macos_without_locks(refusal: str, tmp_path: Path) -> None:
    tour(LIKE_A_SHARE_OF_MACOS, VERBS, tmp_path, refusal)
    check_merged(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
@pytest.mark.parametrize("drive", ["0", "77"])
def test_the_verbs_write_where_files_have_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drive: str
) -> None:
    """Nor is each file there our standard input, another file under its name, or a part of what is read."""
    monkeypatch.setenv("DRIVE", drive)
    (tmp_path / "settings.toml").write_text('[validate]\nfail-on = "error"\n')
    (tmp_path / "out").mkdir()
    lines = "validate {peft} --config ../settings.toml\n" + VERBS
    tour(LIKE_WINDOWS + WITHOUT_IDENTITY, lines, tmp_path / "out", str(Path(__file__).parent))
    check_merged(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
def test_a_card_where_files_have_no_identity_replaces_a_card_and_no_file_of_the_model(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "good" / "peft" / "rslora", tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.md").write_text("of the model")
    system, tests = LIKE_WINDOWS + WITHOUT_IDENTITY, str(Path(__file__).parent)
    (tmp_path / "card.md").write_text("About it.\n")
    tour(system, "card adapter -o card.md", tmp_path, tests)
    written = (tmp_path / "card.md").read_text()
    assert written.startswith("---\n")
    assert "About it.\n" in written
    refused = run(system, "card adapter -o adapter/notes.md", tmp_path, tests)
    assert "the card would replace a file of the model it describes" in refused.stderr
    assert (tmp_path / "adapter" / "notes.md").read_text() == "of the model"


class WithoutPreadv(Posix):
    """macOS before 11."""

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "preadv", raising=False)
            return super().read_into(fd, buffer, offset)


@pytest.mark.parametrize("system", [Posix(), WithoutPreadv(), Plain()])
def test_bytes_are_read_and_written_at_their_place_from_any_thread(tmp_path: Path, system: Platform) -> None:
    data = os.urandom(64 * 1000)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        with ThreadPoolExecutor(4) as pool:
            starts = range(0, len(data), 1000)
            written = pool.map(lambda at: system.write_at(fd, memoryview(data)[at : at + 1000], at), starts)
            assert sum(written) == len(data)
            assert b"".join(pool.map(lambda at: system.read_at(fd, 1000, at), starts)) == data
        buffer = bytearray(5000)
        assert system.read_into(fd, memoryview(buffer), len(data) - 4000) == 4000
        assert bytes(buffer) == data[-4000:] + bytes(1000)
        assert system.read_at(fd, 10, len(data)) == b""
    finally:
        os.close(fd)


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msvcrt", windows_locks)
    monkeypatch.setattr(platform, "PLATFORM", Windows())


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the locks of Windows is made of those of Linux")
@pytest.mark.usefixtures("on_windows")
def test_a_lock_of_windows_keeps_others_out_until_it_is_given_back(tmp_path: Path) -> None:
    """One byte is locked, behind what is written in a lock, which could not be read otherwise."""
    target = str(tmp_path / "out")
    with stage(target, overwrite=False):
        assert [(start, nbytes) for _, start, nbytes in windows_locks.held] == [(1 << 30, 1)]
        with pytest.raises(StorageError, match=f"in use by pid {os.getpid()}"), stage(target, overwrite=False):
            pass
        assert len(windows_locks.held) == 1
    assert windows_locks.held == set()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the locks of Windows is made of those of Linux")
@pytest.mark.usefixtures("on_windows")
def test_a_shared_lock_of_windows_is_held_by_several(tmp_path: Path) -> None:
    target, word = str(tmp_path / "out"), "0123456789abcdef"
    with join(target, word, overwrite=False), join(target, word, overwrite=False):
        assert windows_locks.held == set()
    assert windows_locks.held == set()


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the locks of Windows is made of those of Linux")
@pytest.mark.usefixtures("on_windows")
def test_a_shared_lock_of_windows_that_another_rank_has_for_a_moment_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take it in the same instant; the other gives it back while this one waits."""
    other = os.open(tmp_path / ".out.loraformat-lock.partial", os.O_RDWR | os.O_CREAT)
    os.lseek(other, 1 << 30, os.SEEK_SET)
    windows_locks.locking(other, windows_locks.LK_NBLCK, 1)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        windows_locks.locking(other, windows_locks.LK_UNLCK, 1)

    monkeypatch.setattr(platform, "PLATFORM", Windows(wait))
    try:
        with join(str(tmp_path / "out"), "0123456789abcdef", overwrite=False):
            assert len(waited) == 1
    finally:
        os.close(other)
    assert windows_locks.held == set()


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for the locks of Windows is made of those of Linux")
@pytest.mark.usefixtures("on_windows")
def test_a_shared_lock_of_windows_is_refused_while_a_run_has_the_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(platform, "PLATFORM", Windows(waited.append))
    target = str(tmp_path / "out")
    with (
        stage(target, overwrite=False),
        pytest.raises(StorageError, match=f"in use by pid {os.getpid()}"),
        join(target, "0123456789abcdef", overwrite=False),
    ):
        pass
    assert 0 < sum(waited) <= 1
    assert windows_locks.held == set()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("on_windows")
def test_a_lock_that_fails_on_windows_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fd: int, mode: int, nbytes: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(windows_locks, "locking", failing)
    with pytest.raises(StorageError, match="input/output error"), stage(str(tmp_path / "out"), overwrite=False):
        pass


@pytest.mark.parametrize("system", [Posix(), Plain()])
def test_a_folder_in_the_place_of_a_lock_is_named(
    system: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux says that it is a folder, Windows that access is denied."""
    monkeypatch.setattr(platform, "PLATFORM", system)
    (tmp_path / ".out.loraformat-lock.partial").mkdir()
    if isinstance(system, Plain):
        opened = os.open

        def denying(path: str, flags: int, mode: int = 0o777) -> int:
            if os.path.isdir(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return opened(path, flags, mode)

        monkeypatch.setattr(os, "open", denying)
    with (
        pytest.raises(StorageError, match="another file is in the place of its lock") as caught,
        stage(str(tmp_path / "out"), overwrite=False),
    ):
        pass
    assert "remove" in (caught.value.hint or "")


def test_a_name_that_differs_in_case_alone_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows: the name that is not listed leads to the file that is."""
    (tmp_path / "Model.safetensors").write_bytes(b"first")
    os.link(tmp_path / "Model.safetensors", tmp_path / "model.safetensors")
    every = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [name for name in every(path) if name != "model.safetensors"])
    store = LocalStore(str(tmp_path))
    with (
        pytest.raises(StorageError, match=r"Model\.safetensors stands there") as caught,
        store.create("model.safetensors"),
    ):
        pass
    assert caught.value.hint
    with store.create("Model.safetensors", 6) as writer:
        writer.write(b"second")
    assert (tmp_path / "Model.safetensors").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("address", "has_drives", "path"),
    [
        ("file:///C:/models/a%20b", True, "C:/models/a b"),
        ("file:/C:/models", True, "C:/models"),
        ("file:///models/a", True, "/models/a"),
        ("file:///C:/models", False, "/C:/models"),
    ],
)
def test_addresses_of_files_have_drives_on_windows(address: str, has_drives: bool, path: str) -> None:
    assert _path_of(address, has_drives=has_drives) == path


@pytest.mark.parametrize("kind", [PurePosixPath, PureWindowsPath])
@pytest.mark.parametrize("address", ["hf://owner/name", "s3://bucket/a/b", "abfs://box@account/a"])
def test_an_address_that_pathlib_has_joined_is_named(kind: type[PurePath], address: str) -> None:
    """On Windows with the other slashes."""
    with pytest.raises(UsageError) as caught:
        uri_of(kind(address))
    assert caught.value.hint == f'pass "{address}"'


def test_what_lies_on_another_drive_of_windows_is_below_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    ignores = PathIgnores(path="adapters/**", reasons={"LF105": "the base is private"})
    settings = Settings(source="C:\\project\\loraformat.toml", per_path=(ignores,))
    for name in ("abspath", "dirname", "relpath"):
        monkeypatch.setattr(os.path, name, getattr(ntpath, name))
    monkeypatch.setattr(os, "sep", "\\")
    assert settings.reasons_for("C:\\project\\adapters\\one") == ignores.reasons
    assert settings.reasons_for("D:\\project\\adapters\\one") == {}


def test_a_big_endian_machine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.require_little_endian("little")
    with pytest.raises(UnsupportedMachine, match="this machine is big-endian") as caught:
        machine.require_little_endian("big")
    assert caught.value.code == "LF026"
    refuse = partial(machine.require_little_endian, "big")
    monkeypatch.setattr(cli, "require_little_endian", refuse)
    done = CliRunner().invoke(cli.main, ["inspect", str(FIXTURES / "good" / "peft" / "rslora")])
    assert done.exit_code == 3
    assert "error[LF026] this machine is big-endian; loraformat runs only on little-endian machines" in done.output
    monkeypatch.setattr(machine, "require_little_endian", refuse)
    with pytest.raises(UnsupportedMachine):
        loraformat.__getattr__("merge")
    assert loraformat.__getattr__("StorageError") is StorageError


def test_signals_that_end_a_process_are_those_of_the_system() -> None:
    wanted = {"SIGINT", "SIGTERM", "SIGHUP" if os.name == "posix" else "SIGBREAK"}
    assert {each.name for each in machine.ENDING} == wanted
