"""Ranks that write one output in a bucket: equal bytes, nothing visible before the end, nothing left after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_models import FILES, expected
from s3_runs import add_neighbors, hidden, is_whole, merge, neighbors_are_there, output, own_uploads, visible
from s3_server import S3Server
from test_s3_outputs import start_merge, wait_for

import loraformat
from loraformat.errors import MergeError, StorageError


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_give_the_objects_of_one_process(s3: S3Server, models: Path, world: int) -> None:
    add_neighbors(s3)
    for rank in range(world):
        merge(rank=rank, world=world)
        assert not visible(s3)
    merge(finish=True)
    assert is_whole(s3, models)
    assert not hidden(s3)
    assert neighbors_are_there(s3)


def test_each_byte_that_changes_goes_up_once(s3: S3Server) -> None:
    merge()
    alone = s3.moved()
    since = len(s3.log)
    for rank in range(2):
        merge("s3://models/divided", rank=rank, world=2)
    merge("s3://models/divided", finish=True)
    together = s3.moved(since)
    assert together["in"] <= alone["in"] + 100_000
    assert together["copied"] == alone["copied"]
    assert together["out"] <= alone["out"] + 3_000_000
    assert together["requests"] <= 2.5 * alone["requests"]


def test_a_share_that_is_missing_is_named(s3: S3Server, models: Path) -> None:
    with pytest.raises((StorageError, MergeError)):
        merge(finish=True)
    merge(rank=0, world=2)
    with pytest.raises(MergeError, match=r"rank 1 of 2 has not written all of its share; 1 of 2"):
        merge(finish=True)
    assert not visible(s3)
    merge(rank=1, world=2)
    merge(finish=True)
    assert is_whole(s3, models)


def test_another_run_s_shares_are_refused(s3: S3Server) -> None:
    for rank in range(2):
        merge(rank=rank, world=2)
    with pytest.raises(MergeError, match="belong to ranks of another run: the options"):
        merge(finish=True, dtype="float32")
    data = bytearray(s3.get("models", f"base/{FILES[1]}"))
    data[-1] ^= 1
    s3.put("models", f"base/{FILES[1]}", bytes(data))
    with pytest.raises(MergeError, match="belong to ranks of another run: the base"):
        merge(finish=True)
    assert not visible(s3)


def test_a_rank_that_runs_again_sends_nothing_again(s3: S3Server, models: Path) -> None:
    merge(rank=0, world=1)
    since = len(s3.log)
    merge(rank=0, world=1)
    assert s3.moved(since, op="UploadPart$")["requests"] == 0
    assert s3.moved(since, op="UploadPartCopy")["requests"] == 0
    merge(finish=True)
    assert is_whole(s3, models)


@pytest.mark.parametrize("op", ["CreateMultipartUpload", "UploadPart", "UploadPartCopy"])
def test_a_rank_that_is_killed_and_run_again(s3: S3Server, models: Path, op: str) -> None:
    add_neighbors(s3)
    s3.fault(kind="slow", op=f"{op}$", seconds=5, times=10**6)
    process = start_merge("--rank", "0", "--world", "1")
    wait_for(s3, op, process)
    process.kill()
    process.communicate(timeout=60)
    s3.faults.clear()
    merge(rank=0, world=1)
    merge(finish=True)
    assert is_whole(s3, models)
    assert not hidden(s3)
    assert not own_uploads(s3)
    assert neighbors_are_there(s3)


def test_a_finish_that_is_killed_and_run_again(s3: S3Server, models: Path) -> None:
    """Between the completions of two files: some weights are there, but no config, no index and no manifest."""
    for rank in range(2):
        merge(rank=rank, world=2)
    s3.fault(kind="slow", op="CompleteMultipartUpload$", seconds=5, times=10**6, skip=1)
    process = start_merge("--finish")
    wait_for(s3, "CompleteMultipartUpload", process)
    process.kill()
    process.communicate(timeout=60)
    s3.faults.clear()
    assert not any(key.endswith(".json") for key in visible(s3))
    merge(finish=True)
    assert is_whole(s3, models)
    assert not hidden(s3)


@pytest.mark.parametrize("has_other_etags", [False, True])
@pytest.mark.parametrize("place", ["reading what is complete", "config.json"])
def test_a_finish_that_fails_keeps_what_the_ranks_did(
    s3: S3Server, models: Path, place: str, has_other_etags: bool
) -> None:
    s3.has_other_etags = has_other_etags
    for rank in range(2):
        merge(rank=rank, world=2)
    if place == "config.json":
        s3.fault(kind="status", op="PutObject", key="out/config.json", times=10**6, code=403, error="AccessDenied")
    else:
        s3.fault(kind="status", op="GetObject", key="out/model-", times=10**6, code=403, error="AccessDenied")
    with pytest.raises(StorageError, match="s3://models/out"):
        merge(finish=True)
    s3.faults.clear()
    assert set(visible(s3)) == {f"out/{name}" for name in FILES}
    since = len(s3.log)
    merge(rank=0, world=2)
    merge(finish=True)
    assert s3.moved(since, op="UploadPart")["requests"] == 0
    assert is_whole(s3, models)
    assert not hidden(s3)


def test_a_plain_run_sweeps_what_a_failed_finish_left(s3: S3Server, models: Path) -> None:
    merge(rank=0, world=1)
    s3.fault(kind="status", op="PutObject", key="out/config.json", times=10**6, code=403, error="AccessDenied")
    with pytest.raises(StorageError):
        merge(finish=True)
    s3.faults.clear()
    merge()
    assert is_whole(s3, models)
    assert not hidden(s3)


@pytest.mark.parametrize("options", [{}, {"finish": True}, {"resume": True}], ids=str)
def test_while_a_rank_works_other_runs_are_refused(s3: S3Server, models: Path, options: dict[str, bool]) -> None:
    refused: list[str] = []

    def other(server: S3Server) -> None:
        with pytest.raises(StorageError) as caught:
            merge(**options)
        refused.append(str(caught.value))

    s3.fault(kind="call", op="UploadPart$", function=other)
    merge(rank=0, world=2)
    assert "in use by pid" in refused[0]
    merge(rank=1, world=2)
    merge(finish=True)
    assert is_whole(s3, models)


def test_ranks_work_at_one_time(s3: S3Server, models: Path) -> None:
    s3.fault(kind="call", op="UploadPart$", function=lambda _: merge(rank=1, world=2) and None)
    merge(rank=0, world=2)
    merge(finish=True)
    assert is_whole(s3, models)


def test_an_outer_run_leaves_what_inner_ranks_did(s3: S3Server, models: Path) -> None:
    for rank in range(2):
        merge("s3://models/out/inner", rank=rank, world=2)
    before = set(hidden(s3))
    for options in ({}, {"overwrite": True}, {"rank": 0, "world": 2}):
        with pytest.raises(StorageError, match=r"s3://models/out/inner: an unfinished output of another run"):
            merge(**options)
    assert set(hidden(s3)) == before
    merge("s3://models/out/inner", finish=True)
    assert output(s3, "out/inner/") == expected(models)


def test_a_plain_run_sweeps_what_ranks_left(s3: S3Server, models: Path) -> None:
    merge(rank=0, world=2)
    merge()
    assert is_whole(s3, models)
    assert not hidden(s3)
    with pytest.raises(StorageError, match="exist"):
        merge(rank=0, world=2)


def test_an_upload_that_somebody_aborted_is_made_again(s3: S3Server, models: Path) -> None:
    """A rule of the bucket that removes old uploads."""
    for rank in range(2):
        merge(rank=rank, world=2)
    for name in [name for name, upload in s3.multiparts.items() if upload["key"].endswith(FILES[0])]:
        del s3.multiparts[name]
    with pytest.raises(loraformat.LoraFormatError):
        merge(finish=True)
    assert not any(key.endswith(".json") for key in visible(s3))
    for rank in range(2):
        merge(rank=rank, world=2)
    merge(finish=True)
    assert is_whole(s3, models)


def test_outputs_that_ranks_write_over_an_old_one(s3: S3Server, models: Path) -> None:
    merge(dtype="float16")
    before = {key: s3.get("models", key) for key in visible(s3)}
    for rank in range(2):
        merge(rank=rank, world=2, overwrite=True)
    assert {key: s3.get("models", key) for key in visible(s3)} == before
    with pytest.raises(StorageError, match="exist"):
        merge(finish=True)
    merge(finish=True, overwrite=True)
    assert is_whole(s3, models)
