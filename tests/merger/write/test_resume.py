"""Merges that are killed at a chosen byte and continued: the output is that of a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hub_server import COMMIT, Hub
from merger.checkpoints import adapter_folder, config, contents, save_base, weights

from loraformat.containers import open_weights
from loraformat.jobs.merge import merge
from loraformat.storage import LocalStore

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in ("q_proj", "up_proj", "down_proj")]

# Kills itself as soon as a share of all bytes is written, and so many files stand in the journal.
KILLED = """
import glob, json, os, signal, sys
from loraformat.jobs.merge import merge
base, change, out, jobs, share, files, options = sys.argv[1:]
def complete():
    for path in glob.glob(os.path.dirname(out) + "/.*.partial/.loraformat-journal.json"):
        try:
            return len(json.load(open(path))["files"])
        except (OSError, ValueError):  # being written just now
            break
    return 0
def progress(done, total):
    if done > float(share) * total:
        while complete() < int(files):
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGKILL)
merge(base, [change], out, jobs=int(jobs), memory_nbytes=1, progress=progress, **json.loads(options))
"""


@pytest.fixture(params=["safetensors", "torch"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=4)
    if request.param == "torch":
        as_torch(base)
    return str(base), str(adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES}))


def as_torch(base: Path) -> None:
    """Turn a base into the `.bin` shards that older ones have."""
    from safetensors.torch import load_file

    for path in base.glob("*.safetensors"):
        torch.save(load_file(path), base / path.name.replace("safetensors", "bin"))
        path.unlink()
    index = base / "model.safetensors.index.json"
    (base / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()


def unfinished(out: Path) -> list[Path]:
    return [path for path in out.parent.glob(f".{out.name}.loraformat-*.partial") if path.is_dir()]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_merge_that_is_killed_twice_goes_on_to_the_same_bytes(
    inputs: tuple[str, str], tmp_path: Path, jobs: int
) -> None:
    base, change = inputs
    out = tmp_path / "out"
    for share in ("0", "0.6"):
        command = [sys.executable, "-c", KILLED, base, change, str(out), str(jobs), share, "0", '{"resume": true}']
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(unfinished(out)) == 1
        assert not out.exists()
    merge(base, [change], str(out), jobs=jobs, resume=True, verify="full")
    merge(base, [change], str(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out", "whole"]


def test_progress_begins_with_what_is_there(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    base, change = inputs
    with monkeypatch.context() as patched:
        patched.setattr("loraformat.merger.verify.check_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [change], str(tmp_path / "out"), resume=True)
    seen: list[tuple[int, int]] = []
    merge(base, [change], str(tmp_path / "out"), resume=True, progress=lambda done, total: seen.append((done, total)))
    ((done, total),) = seen
    assert done == total > 0


def test_an_incomplete_file_under_its_own_name_is_written_again(inputs: tuple[str, str], tmp_path: Path) -> None:
    """What a journal does not list may be cut anywhere, or be longer than it should."""
    base, change = inputs
    merge(base, [change], str(tmp_path / "whole"))
    left = tmp_path / ".out.loraformat-0123abcd.partial"
    left.mkdir()
    for name, data in contents(tmp_path / "whole").items():
        (left / name).write_bytes(data[: len(data) // 2] + bytes(len(data)))
    merge(base, [change], str(tmp_path / "out"), resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(inputs: tuple[str, str], out: Path, **options: object) -> Path:
    """The folder that a run without --resume leaves when it is killed, with complete files in it."""
    base, change = inputs
    command = [sys.executable, "-c", KILLED, base, change, str(out), "1", "0.6", "1", json.dumps(options)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = unfinished(out)
    return left


def journal_of(left: Path) -> dict[str, dict]:
    return json.loads((left / ".loraformat-journal.json").read_bytes())["files"]


def codes(report: object) -> dict[str, str]:
    return {found.code: found.message for found in report.findings}


def test_a_run_without_resume_can_be_resumed(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Nobody knows beforehand that a run will be killed."""
    base, change = inputs
    left = interrupted(inputs, tmp_path / "out")
    complete = journal_of(left)
    inodes = {name: (left / name).stat().st_ino for name in complete}
    report = merge(base, [change], str(tmp_path / "out"), resume=True)
    assert f"{len(complete)} complete files" in codes(report)["LF812"]
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in complete} == inodes
    merge(base, [change], str(tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["computed", "copied", "first", "last"])
def test_a_byte_that_flipped_in_a_complete_file_is_not_taken_over(
    inputs: tuple[str, str], tmp_path: Path, place: str
) -> None:
    """The times are those of before, as for a fault of the disk."""
    base, change = inputs
    left = interrupted(inputs, tmp_path / "out")
    name = min(journal_of(left))
    tensors = open_weights(LocalStore(str(left)), [name])[1]
    computed = next(tensor for key, tensor in tensors.items() if key in NAMES)
    copied = next(tensor for key, tensor in tensors.items() if key not in NAMES and tensor.span.nbytes)
    offset = {"computed": computed.span.offset, "copied": copied.span.end - 1, "first": 0, "last": -1}[place]
    data, status = bytearray((left / name).read_bytes()), (left / name).stat()
    data[offset] ^= 1
    (left / name).write_bytes(data)
    os.utime(left / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = merge(base, [change], str(tmp_path / "out"), resume=True)
    assert name not in codes(report)["LF812"]
    merge(base, [change], str(tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["link", "second name"])
def test_a_complete_file_that_also_stands_elsewhere_is_not_taken_over(
    inputs: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    """An output that is whole today would change when the other file does."""
    base, change = inputs
    left = interrupted(inputs, tmp_path / "out")
    name = min(journal_of(left))
    elsewhere = tmp_path / f"elsewhere-{name}"
    (left / name).rename(elsewhere)
    if kind == "link":
        (left / name).symlink_to(elsewhere)
    else:
        os.link(elsewhere, left / name)
    report = merge(base, [change], str(tmp_path / "out"), resume=True)
    assert name not in codes(report)["LF812"]
    assert not (tmp_path / "out" / name).is_symlink()
    assert not (tmp_path / "out" / name).samefile(elsewhere)


@pytest.mark.parametrize("inputs", ["safetensors"], indirect=True)  # a .pt file has checksums
def test_an_input_that_changed_in_place_is_not_resumed_from(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Its size and time are those of before, as some programs that copy leave them."""
    base, change = inputs
    left = interrupted(inputs, tmp_path / "out")
    path = Path(base, min(journal_of(left)))
    status = path.stat()
    tensors = open_weights(LocalStore(base), [path.name])[1]
    offset = next(tensor.span.end for key, tensor in tensors.items() if key in NAMES) - 1
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([path.read_bytes()[offset] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    merge(base, [change], str(tmp_path / "out"), resume=True, verify="none")
    merge(base, [change], str(tmp_path / "whole"), verify="none")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_repository_that_moved_on_is_not_resumed_from(inputs: tuple[str, str], tmp_path: Path) -> None:
    """Names and sizes of its files are those of before, and so is its address."""
    base, change = inputs
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    address, out = "hf://org/base", tmp_path / "out"
    command = [sys.executable, "-c", KILLED, base, address, str(out), "1", "0.6", "1", "{}"]
    resumed = [sys.executable, "-m", "loraformat", "merge", base, address, "-o", str(out), "--resume"]
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        environment["HF_ENDPOINT"] = server.endpoint
        server.files |= contents(Path(change))
        assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
        shutil.rmtree(change)
        tensors = weights()
        adapter_folder(Path(change), {name: tuple(tensors[name].shape) for name in NAMES}, seed=4)
        server.files |= contents(Path(change))
        server.commit = COMMIT[::-1]
        done = subprocess.run(resumed, check=False, env=environment, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "nothing to resume" in done.stderr
    merge(base, [change], str(tmp_path / "whole"))
    for name in sorted(path.name for path in out.iterdir() if "loraformat" not in path.name):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_leftover_with_folders_in_it_is_resumed(inputs: tuple[str, str], tmp_path: Path) -> None:
    base, change = inputs
    left = interrupted(inputs, tmp_path / "out")
    (left / "sub" / "deep").mkdir(parents=True)
    (left / "sub" / "deep" / "file").write_text("x")
    report = merge(base, [change], str(tmp_path / "out"), resume=True)
    assert "complete files" in codes(report)["LF812"]
    merge(base, [change], str(tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def signed(journal: dict[str, object]) -> bytes:
    """A journal with the digest of what it says now."""
    values = {key: value for key, value in journal.items() if key != "digest"}
    return json.dumps({**values, "digest": blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()}).encode()


def damaged(journal: dict[str, object]) -> Iterator[bytes]:
    """Journals of a wrong form, and ones that claim more than they prove."""
    yield from (b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"fingerprint": 1}', b'{"files": []}', b"\xff" * 9)
    files = journal["files"]
    assert isinstance(files, dict)
    name, entry = next(iter(files.items()))
    for changed in (
        {},
        [],
        {**entry, "runs": []},
        {**entry, "runs": [[0, 1, "x"]]},
        {**entry, "runs": [[-9, 1 << 70, entry["runs"][0][2]]]},
        {**entry, "runs": entry["runs"][:-1]},
        {**entry, "runs": [[offset, nbytes, 7] for offset, nbytes, _ in entry["runs"]]},
        {**entry, "runs": 3},
        {**entry, "tallies": {"x": {"kept": 1}}},
        {**entry, "digests": None},
    ):
        yield signed({**journal, "files": {**files, name: changed}})
    tensor, tally = next(iter(entry["tallies"].items()))
    for figure in ("a", [], None, -1e300):
        wrong = {**entry, "tallies": {**entry["tallies"], tensor: dict.fromkeys(tally, figure)}}
        yield signed({**journal, "files": {**files, name: wrong}})
    yield signed({**journal, "files": {**files, "../../elsewhere": entry, "absent": entry}})
    yield signed({**journal, "files": [name]})
    for part in ({"digests": {tensor: "0" * 64}}, {"digests": {}}, {"tallies": {}}):  # of itself it has another digest
        yield json.dumps({**journal, "files": {**files, name: {**entry, **part}}}).encode()


def test_a_damaged_journal_proves_nothing(tmp_path: Path) -> None:
    tensors = weights(dtype=torch.bfloat16)
    base = save_base(tmp_path / "base", tensors, config(), shards=4)
    change = adapter_folder(tmp_path / "adapter", {name: tuple(tensors[name].shape) for name in NAMES})
    (tmp_path / "elsewhere").write_text("kept")
    merge(str(base), [str(change)], str(tmp_path / "whole"))
    left = interrupted((str(base), str(change)), tmp_path / "out")
    kept = tmp_path / "kept"
    shutil.copytree(left, kept)
    journal = json.loads((left / ".loraformat-journal.json").read_bytes())
    for text in damaged(journal):
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(kept, left)
        (left / ".loraformat-journal.json").write_bytes(text)
        merge(str(base), [str(change)], str(tmp_path / "out"), resume=True)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), text[:80]
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_a_plain_run_says_what_it_cleared_and_resume_that_there_is_nothing(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    base, change = inputs
    interrupted(inputs, tmp_path / "out")
    assert "removed the unfinished output" in codes(merge(base, [change], str(tmp_path / "out")))["LF813"]
    assert "nothing to resume" in codes(merge(base, [change], str(tmp_path / "other"), resume=True))["LF812"]
    assert "LF813" not in codes(merge(base, [change], str(tmp_path / "third")))


def test_without_digests_of_copied_bytes_nothing_is_taken_over_unproved(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    base, change = inputs
    interrupted(inputs, tmp_path / "out", digests="none")
    report = merge(base, [change], str(tmp_path / "out"), resume=True, digests="none")
    assert "nothing to resume" in codes(report)["LF812"]
