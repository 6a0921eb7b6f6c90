"""Report files: regular ones appear whole, everything else is written through and stays what it is."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import write_to

GOOD = Path(__file__).parents[3] / "fixtures" / "good" / "peft" / "tiny-llama"
# `exec` before the command: its stdout, and no other process's, is what the shell has opened.
VALIDATE = f'exec "{sys.executable}" -m loraformat validate "{GOOD}"'


def node(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    return status.st_mode, status.st_ino, status.st_rdev


def read_in_background(path: Path) -> tuple[threading.Thread, list[bytes]]:
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(path.read_bytes()))
    thread.start()
    return thread, got


def test_a_regular_file_is_replaced_and_its_other_names_are_not(tmp_path: Path) -> None:
    target, other = tmp_path / "report", tmp_path / "other name"
    target.write_bytes(b"before")
    os.link(target, other)
    write_to(str(target), b"after")
    assert (target.read_bytes(), other.read_bytes()) == (b"after", b"before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other name", "report"]


def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"longer than what comes")
    link.symlink_to("target")
    before = node(link), node(target)
    write_to(str(link), b"after")
    assert (node(link), node(target)) == before
    assert target.read_bytes() == b"after"


def test_a_fifo_stays_and_its_reader_gets_everything(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to("fifo")
    before = node(fifo), node(link)
    much = bytes(range(256)) * 4096  # more than a pipe holds
    for path in (fifo, link):
        thread, got = read_in_background(fifo)
        write_to(str(path), much)
        thread.join()
        assert got == [much]
    assert (node(fifo), node(link)) == before


def test_a_link_to_a_device_stays_a_link_and_the_device_a_device(tmp_path: Path) -> None:
    """A pseudo-terminal, so that no device of the machine is at stake."""
    master, slave = os.openpty()
    try:
        device, link = Path(os.ttyname(slave)), tmp_path / "terminal"
        link.symlink_to(device)
        before = node(device), node(link)
        write_to(str(link), b"said\n")
        assert os.read(master, 100).replace(b"\r", b"") == b"said\n"
        assert (node(device), node(link)) == before
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("kind", ["nowhere", "loop", "folder", "socket"])
def test_what_cannot_be_written_through_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "x"
    if kind == "folder":
        target.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(target))
    else:
        target.symlink_to("x" if kind == "loop" else "nothing")
    before = node(target)
    with pytest.raises(StorageError):
        write_to(str(target), b"after")
    assert node(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("into", ["pipe", "file", "appended"])
def test_a_report_to_standard_output_stands_beside_what_is_printed(name: str, into: str, tmp_path: Path) -> None:
    """Into a pipe and a redirected file alike, with the text after it, and nothing overwritten."""
    if not os.path.exists(name):
        pytest.skip(f"{name} is not there")
    link, out = tmp_path / "stdout", tmp_path / "out"
    link.symlink_to(name)
    before = node(link)
    out.write_bytes(b"")
    sign = {"pipe": f'| cat > "{out}"', "file": f'> "{out}"', "appended": f'>> "{out}"'}[into]
    done = subprocess.run(["bash", "-c", f'({VALIDATE} --report "json={link}") {sign}'], cwd=tmp_path, check=False)
    assert done.returncode == 0
    document, end = json.JSONDecoder().raw_decode(out.read_text(encoding="utf-8"))
    assert document["job"] == "validate"
    assert "OK" in out.read_text(encoding="utf-8")[end:]
    assert node(link) == before


def test_a_report_goes_through_a_pipe_of_the_shell(tmp_path: Path) -> None:
    """`--report json=>(command)`, which the shell spells /dev/fd/63."""
    out = tmp_path / "out"
    command = (
        f'{VALIDATE.removeprefix("exec ")} --report json=>(cat > "{out}"; echo end >> "{out}") > /dev/null; wait $!'
    )
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert json.JSONDecoder().raw_decode(out.read_text(encoding="utf-8"))[0]["job"] == "validate"


def test_a_fifo_is_written_through_by_the_command(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread, got = read_in_background(fifo)
    done = subprocess.run(["bash", "-c", f'{VALIDATE} --report "json={fifo}"'], capture_output=True, check=False)
    thread.join()
    assert done.returncode == 0, done.stderr
    assert json.loads(got[0])["job"] == "validate"
    assert stat.S_ISFIFO(os.lstat(fifo).st_mode)
