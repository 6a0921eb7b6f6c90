"""Systems that are not Linux: what they lack is taken away here, and the verbs still do what they do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import loraformat
from loraformat import cli, machine
from loraformat.errors import StorageError, UnsupportedMachine
from loraformat.storage import LocalStore, platform, stage
from loraformat.storage.locations import _path_of
from loraformat.storage.platform import Plain, Platform, Posix, Windows

FIXTURES = Path(__file__).parents[2] / "fixtures"

# Runs before anything is imported: a Python as on Windows, as far as this one can be made like it.
LIKE_WINDOWS = """
import mmap, os, signal, sys

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del signal.SIGHUP, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
for name in (
    "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "copy_file_range", "fchmod",
    "geteuid", "getegid", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "statvfs",
):
    delattr(os, name)
for found in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
    found.clear()

listed = os.scandir


def opened():
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass


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
"""

TOUR = """
from loraformat.storage import platform
from loraformat.cli import main

platform.PLATFORM = platform.Plain()
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are looked up in /proc")
def test_the_verbs_need_nothing_that_windows_lacks(tmp_path: Path) -> None:
    """No fcntl, SIGHUP, pread or O_DIRECT; open files can be neither renamed nor removed, a rename replaces nothing."""
    lines = VERBS.format(minigpt=FIXTURES / "minigpt", peft=FIXTURES / "good" / "peft" / "rslora")
    command = [sys.executable, "-c", LIKE_WINDOWS + TOUR, lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == ["converted", "merged"]
    loraformat.merge(FIXTURES / "minigpt" / "base", [tmp_path / "converted"], tmp_path / "here")
    assert (tmp_path / "merged" / "model.pt").read_bytes() == (tmp_path / "here" / "model.pt").read_bytes()


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


def test_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy of its C library: one byte, behind what is written in a lock, and EACCES where another has it."""
    library, asked = ModuleType("msvcrt"), []

    def locking(fd: int, mode: int, nbytes: int) -> None:
        asked.append((os.lseek(fd, 0, os.SEEK_CUR), mode, nbytes))
        if len(asked) > 1:
            raise OSError(errno.EACCES if len(asked) == 2 else errno.EIO, "no")

    library.locking, library.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msvcrt", library)
    monkeypatch.setattr(platform, "PLATFORM", Windows())
    with stage(str(tmp_path / "out"), overwrite=False):
        assert asked == [(1 << 30, 2, 1)]
        with (
            pytest.raises(StorageError, match=f"in use by pid {os.getpid()}"),
            stage(str(tmp_path / "out"), overwrite=False),
        ):
            pass
    with pytest.raises(StorageError, match="no"), stage(str(tmp_path / "new"), overwrite=False):
        pass
    assert (tmp_path / "out").is_dir()


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
    wanted = {"SIGINT", "SIGTERM"} | ({"SIGHUP"} if os.name == "posix" else set())
    assert {each.name for each in machine.ENDING} == wanted
