"""Several processes write one output, each its share, and one finishes it: the bytes are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merger.checkpoints import adapter_folder, config, save_base, weights
from object_store import Bucket

import loraformat
from loraformat.errors import MergeError, StorageError
from loraformat.merger import MergePlan, divided, shares_of
from loraformat.storage import platform, schemes
from loraformat.storage.platform import Plain

SHAPES = {"model.layers.0.q_proj.weight": (24, 24), "model.layers.1.up_proj.weight": (130, 24)}
FILES = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", weights(dtype=torch.bfloat16), config(), shards=3)


@pytest.fixture
def change(tmp_path: Path) -> Path:
    return adapter_folder(tmp_path / "change", SHAPES)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    made = Bucket()
    monkeypatch.setitem(schemes.SCHEMES, "toy", made.scheme())
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def left_in(folder: Path, name: str = "out") -> Path:
    (found,) = folder.glob(f".{name}.loraformat-*.partial")
    return found


Run = Callable[..., Any]


@pytest.fixture
def run(base: Path, change: Path, tmp_path: Path) -> Run:
    """A merge of base and change into `out`, by whatever process."""

    def merge(out: str | Path = "out", **options: Any) -> Any:
        target = out if isinstance(out, str) and "://" in out else tmp_path / out
        return loraformat.merge(base, [change], target, **options)

    return merge


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 1000), max_size=12),
    st.integers(1, 20),
)
def test_every_file_is_in_one_share_and_shares_are_balanced(sizes: dict[str, int], world: int) -> None:
    shares = divided(sizes, world)
    assert len(shares) == world
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes.values()) / world + max(sizes.values(), default=0)
    assert divided(dict(reversed(sizes.items())), world) == shares
    assert sum(map(bool, shares)) == min(world, len(sizes))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_of_any_number_give_the_folder_of_one_process(run: Run, tmp_path: Path, world: int) -> None:
    run("plain")
    shares = []
    for rank in reversed(range(world)):
        report = run(rank=rank, world=world)
        assert not (tmp_path / "out").exists()
        assert report.written == ()
        assert report.data.retained is None
        shares += report.data.share.files
    assert sorted(shares) == FILES
    report = run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert report.data.share is None
    assert report.data.retained == pytest.approx(1, abs=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "change", "out", "plain"]


@pytest.mark.parametrize(
    "options",
    [
        {"digests": "none"},
        {"digests": "sha256"},
        {"max_shard_nbytes": 8000, "dtype": "float32"},
        {"container": "torch"},
        {"dtype": "float16", "rounding": "stochastic", "seed": 7},
        {"verify": "full", "jobs": 3},
    ],
    ids=str,
)
def test_options_change_nothing_about_it(run: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    run("plain", **options)
    for rank in range(2):
        run(rank=rank, world=2, **options)
    run(finish=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_store_of_objects_gets_the_same(run: Run, bucket: Bucket, tmp_path: Path) -> None:
    run("plain")
    for rank in range(2):
        run("toy://b/out", rank=rank, world=2)
        assert bucket.folder("toy://b/out") == {}
    run("toy://b/out", finish=True)
    assert bucket.folder("toy://b/out") == contents(tmp_path / "plain")


def test_a_share_that_is_missing_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no rank of this run has written anything there"):
        run(finish=True)
    run(rank=1, world=3)
    missing = [name for name in FILES if name not in os.listdir(left_in(tmp_path))]
    with pytest.raises(MergeError, match=rf"rank 0, 2 of 3 has not written all.*2 of 3.*{missing[0]}, {missing[1]}"):
        run(finish=True)
    assert not (tmp_path / "out").exists()
    run(rank=0, world=3)
    run(rank=2, world=3)
    run(finish=True)
    assert (tmp_path / "out").exists()


def test_ranks_of_another_number_may_help(run: Run, tmp_path: Path) -> None:
    run("plain")
    run(rank=0, world=2)
    run(rank=1, world=5)
    for rank in range(5):
        run(rank=rank, world=5)
    run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"dtype": "float32"}, "the options"),
        ({"digests": "none"}, "the options"),
        ({"max_shard_nbytes": 8000}, "the options"),
        ("strength", "the adapters"),
        ("adapter", "the adapters"),
        ("base", "the base"),
        ("version", r"loraformat 0\.0\.7 wrote it, this is"),
    ],
    ids=str,
)
def test_shares_of_another_run_are_refused_by_what_differs(
    run: Run, base: Path, change: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Any, expected: str
) -> None:
    if changed == "version":
        monkeypatch.setattr("loraformat.merger.write.receipts.__version__", "0.0.7")
    for rank in range(2):
        run(rank=rank, world=2)
    monkeypatch.undo()
    adapters, options = [str(change)], changed if isinstance(changed, dict) else {}
    if changed == "strength":
        adapters = [f"{change}=0.5"]
    if changed == "adapter":
        touch_values(change / "adapter_model.safetensors")
    if changed == "base":
        touch_values(base / FILES[1])
    with pytest.raises(MergeError, match=f"belong to ranks of another run: .*{expected}"):
        loraformat.merge(base, adapters, tmp_path / "out", finish=True, **options)
    assert not (tmp_path / "out").exists()
    assert left_in(tmp_path).is_dir()


def touch_values(path: Path) -> None:
    """Another value, and as after any program that writes, another time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_inputs_may_lie_elsewhere_for_another_process(
    run: Run, base: Path, change: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount under another name, or a relative path."""
    run("plain")
    (tmp_path / "mount").symlink_to(tmp_path)
    loraformat.merge(tmp_path / "mount" / "base", [tmp_path / "mount" / "change"], tmp_path / "out", rank=0, world=2)
    monkeypatch.chdir(tmp_path)
    loraformat.merge("base", ["change"], "out", rank=1, world=2)
    run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_receipt_from_elsewhere_is_refused(run: Run, base: Path, change: Path, tmp_path: Path) -> None:
    loraformat.merge(base, [f"{change}=0.5"], tmp_path / "other", rank=0, world=1)
    for rank in range(2):
        run(rank=rank, world=2)
    name = f".loraformat-rank-{FILES[0]}.json"
    (left_in(tmp_path) / name).write_bytes((left_in(tmp_path, "other") / name).read_bytes())
    with pytest.raises(MergeError, match=rf"{name}: the receipt is of another run: the adapters.* differed"):
        run(finish=True)
    run(rank=0, world=1)  # computes that file once more
    run(finish=True)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"schema": "loraformat.rank-receipt/1"}', b"\xff", None])
def test_a_damaged_receipt_is_refused(run: Run, tmp_path: Path, damage: bytes | None) -> None:
    run("plain")
    for rank in range(2):
        run(rank=rank, world=2)
    path = left_in(tmp_path) / f".loraformat-rank-{FILES[0]}.json"
    path.write_bytes(path.read_bytes().replace(b'"rank": 0', b'"rank": 7') if damage is None else damage)
    with pytest.raises(MergeError, match=r"receipt is damaged|has not written"):
        run(finish=True)
    for rank in range(2):
        run(rank=rank, world=2)
    run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize("verify", ["none", "sample", "full"])
def test_bytes_that_a_rank_did_not_write_are_refused(run: Run, tmp_path: Path, verify: str) -> None:
    for rank in range(2):
        run(rank=rank, world=2)
    path = left_in(tmp_path) / FILES[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MergeError, match=rf"{FILES[1]}: the file was modified after rank \d of 2 wrote it"):
        run(finish=True, verify=verify)
    assert not (tmp_path / "out").exists()
    for rank in range(2):
        run(rank=rank, world=2)
    run(finish=True, verify=verify)


def test_a_file_that_is_gone_is_missed(run: Run, tmp_path: Path) -> None:
    for rank in range(2):
        run(rank=rank, world=2)
    (left_in(tmp_path) / FILES[2]).unlink()
    with pytest.raises(MergeError, match=rf"has not written all of its share; 1 of 3 .*{FILES[2]}"):
        run(finish=True)


def test_a_copy_of_a_rank_s_file_is_proved_by_its_digests(run: Run, tmp_path: Path) -> None:
    """A shared folder that was restored, or moved to another disk."""
    run("plain")
    for rank in range(2):
        run(rank=rank, world=2)
    path = left_in(tmp_path) / FILES[1]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_rank_that_runs_again_writes_nothing_again(run: Run, tmp_path: Path) -> None:
    run(rank=0, world=1)
    before = {path.name: path.stat().st_mtime_ns for path in left_in(tmp_path).iterdir()}
    met: list[str] = []
    run(rank=0, world=1, announce=lambda findings: met.extend(one.message for one in findings))
    assert {path.name: path.stat().st_mtime_ns for path in left_in(tmp_path).iterdir()} == before
    assert any("3 complete files of an unfinished output were reused" in message for message in met)


def test_one_that_resumes_alone_does_not_use_what_ranks_left(run: Run, tmp_path: Path) -> None:
    run("plain")
    run(rank=0, world=2)
    codes: list[str] = []
    run(resume=True, announce=lambda findings: codes.extend(one.code for one in findings))
    assert "LF813" in codes
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert not list(tmp_path.glob(".out*"))


KILLED = """
import os, signal, sys, loraformat
base, change, out, options, limit = sys.argv[1:]
done = 0
def progress(now, total):
    if now >= float(limit) * total > 0:
        os.kill(os.getpid(), signal.SIGKILL)
loraformat.merge(base, [change], out, progress=progress, **eval(options))
"""


@pytest.mark.parametrize("limit", [0.01, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("options", [{"rank": 0, "world": 1}, {"finish": True}], ids=str)
def test_a_process_that_is_killed_and_run_again(
    run: Run, base: Path, change: Path, tmp_path: Path, options: dict[str, Any], limit: float
) -> None:
    run("plain")
    if "finish" in options:
        run(rank=0, world=1)
    command = [sys.executable, "-c", KILLED, base, change, tmp_path / "out", repr(options), str(limit)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(rank=0, world=1)
    run(finish=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert not list(tmp_path.glob(".out*"))


def test_nobody_else_can_write_there_while_a_rank_does(run: Run, tmp_path: Path) -> None:
    refused: list[str] = []

    def others(done: int, total: int) -> None:
        for options in ({}, {"resume": True}, {"finish": True}, {"overwrite": True}):
            with pytest.raises(StorageError, match="in use by pid"):
                run(**options)
            refused.append(str(options))

    run(rank=0, world=2, progress=others)
    assert len(refused) >= 4
    run(rank=1, world=2)
    run(finish=True)


def test_a_rank_that_was_forgotten_does_no_harm_where_there_are_no_locks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was taken for dead: others do its share and finish, while it is in the middle of a file."""
    monkeypatch.setattr(platform, "PLATFORM", Plain())
    run("plain")
    finished: list[bool] = []

    def others(done: int, total: int) -> None:
        if not finished:
            finished.append(True)
            run(rank=0, world=1)
            run(finish=True)

    with pytest.raises(StorageError):
        run(rank=0, world=2, progress=others)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert not [path for path in tmp_path.glob(".out*") if "lock" not in path.name]


def test_a_failure_while_finishing_keeps_what_ranks_wrote(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MergeError("the check failed")

    run(rank=0, world=1)
    with monkeypatch.context() as patch:
        patch.setattr("loraformat.merger.verify.check_output", broken)
        with pytest.raises(MergeError, match="the check failed"):
            run(finish=True)
    assert not (tmp_path / "out").exists()
    run(finish=True)


def test_dequantizing_is_divided_too(tmp_path: Path) -> None:
    nf4 = "fixtures/quantized/nf4"
    loraformat.dequantize(nf4, tmp_path / "plain")
    for rank in range(2):
        loraformat.dequantize(nf4, tmp_path / "dense", rank=rank, world=2)
    loraformat.dequantize(nf4, tmp_path / "dense", finish=True)
    assert contents(tmp_path / "dense") == contents(tmp_path / "plain")


@pytest.mark.parametrize("with_base", [True, False])
def test_unmerging_compares_when_it_is_finished(
    run: Run, base: Path, change: Path, tmp_path: Path, with_base: bool
) -> None:
    run("merged")
    more = {"base": base} if with_base else {}
    loraformat.unmerge(tmp_path / "merged", [change], tmp_path / "plain", **more)
    for rank in range(2):
        report = loraformat.unmerge(
            tmp_path / "merged", [change], tmp_path / "back", rank=rank, world=2, strict=True, **more
        )
        assert report.data.proof == "none"
        assert report.data.share.world == 2
    report = loraformat.unmerge(tmp_path / "merged", [change], tmp_path / "back", finish=True, **more)
    assert report.data.proof == ("base" if with_base else "manifest")
    assert contents(tmp_path / "back") == contents(tmp_path / "plain")


def test_a_plan_divides_by_bytes(run: Run) -> None:
    plan = MergePlan.from_json(json.loads(json.dumps(run("nowhere", dry_run=True).data.plan)))
    sizes = {shard.target: sum(tensor.shape[0] for tensor in shard.tensors) for shard in plan.shards}
    assert sorted(name for share in shares_of(plan, 2) for name in share) == sorted(sizes)


def test_ranks_replace_an_earlier_output_at_the_end(run: Run, tmp_path: Path) -> None:
    run("plain")
    run(dtype="float32")
    before = contents(tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        run(rank=0, world=2)
    for rank in range(2):
        run(rank=rank, world=2, overwrite=True)
    assert contents(tmp_path / "out") == before
    with pytest.raises(StorageError, match="exists already"):
        run(finish=True)
    run(finish=True, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
