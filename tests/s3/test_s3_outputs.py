"""Outputs in a bucket: what moves, what a process that is killed leaves, and every verb that writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3_models import EDITED, FILES, HIDDEN
from s3_runs import (
    ADAPTER,
    BASE,
    OUT,
    add_neighbors,
    hidden,
    is_whole,
    merge,
    neighbors_are_there,
    output,
    own_uploads,
    visible,
)
from s3_server import S3Server

import loraformat
from loraformat.errors import StorageError
from loraformat.jobs.diff import diff
from loraformat.jobs.verify import verify
from loraformat.report import render_all
from loraformat.storage import join, open_store, stage

MIB = 1 << 20
EDITED_NBYTES = 2 * HIDDEN * HIDDEN


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loraformat", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_merge(*more: str) -> subprocess.Popen[str]:
    return start("merge", BASE, ADAPTER, "-o", OUT, *more)


def wait_for(s3: S3Server, op: str, process: subprocess.Popen[str]) -> None:
    """Until the server has begun to answer a request; for two minutes at most."""
    for _ in range(2400):
        if any(row["op"] == op for row in list(s3.log)):
            return
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"no {op}")


# What moves


def test_only_changed_bytes_move(s3: S3Server, models: Path) -> None:
    merge()
    assert is_whole(s3, models)
    moved = s3.moved()
    # One part of 5 MiB holds the tensor that changes: S3 takes no smaller one in the middle of a file.
    assert moved["in"] <= 5 * MIB + 100_000
    assert moved["copied"] >= 17 * MIB
    assert s3.moved(key=f"base/{FILES[1]}", op="GetObject")["out"] <= 200_000
    assert moved["requests"] <= 120


def test_sent_bytes_are_those_that_change_where_much_does(s3: S3Server, models: Path) -> None:
    """A base whose changed tensors are larger than a part: no more than 1.3 times their bytes go up."""
    from s3_models import make_large

    changed = make_large(models / "large")
    s3.put_folder("models", "large", str(models / "large" / "base"))
    s3.put_folder("models", "large-adapter", str(models / "large" / "adapter"))
    since = len(s3.log)
    loraformat.merge("s3://models/large", ["s3://models/large-adapter"], OUT)
    assert s3.moved(since)["in"] <= 1.3 * changed
    assert s3.moved(since)["copied"] >= 20 * MIB
    loraformat.merge(models / "large" / "base", [models / "large" / "adapter"], models / "large" / "out")
    for name, data in output(s3).items():
        assert data == (models / "large" / "out" / name).read_bytes(), name


def test_headers_are_all_that_validation_reads(s3: S3Server) -> None:
    assert loraformat.validate(ADAPTER, base=BASE).ok
    assert s3.moved()["out"] <= 2 * MIB
    assert s3.moved()["requests"] <= 40


def test_the_factors_of_an_adapter_are_fetched_once(s3: S3Server) -> None:
    merge()
    rows = [row for row in s3.log if row["op"] == "GetObject" and row["key"] == "adapter/adapter_model.safetensors"]
    assert len(rows) <= 6


def test_memory_stays_bounded(s3: S3Server, models: Path) -> None:
    """All of 130 MB changes, in a process whose peak is measured; parts in flight are what it holds."""
    from s3_models import make_wide

    make_wide(models / "wide")
    s3.put_folder("models", "wide", str(models / "wide" / "base"))
    s3.put_folder("models", "wide-adapter", str(models / "wide" / "adapter"))
    code = (
        "import loraformat\n"
        f"loraformat.merge('s3://models/wide', ['s3://models/wide-adapter'], '{OUT}', jobs=2)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 350 * 1024
    shutil.rmtree(models / "wide")


# Ends


def test_a_signal_while_parts_go_up_leaves_nothing(s3: S3Server) -> None:
    add_neighbors(s3)
    s3.fault(kind="slow", op="UploadPart$", seconds=2, times=10**6)
    process = start_merge()
    wait_for(s3, "UploadPart", process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "no partial output is left" in said
    assert (visible(s3), hidden(s3), own_uploads(s3)) == ([], [], [])
    assert neighbors_are_there(s3)


def test_a_signal_while_an_upload_is_begun_waits_for_the_answer(s3: S3Server) -> None:
    s3.fault(kind="slow", op="CreateMultipartUpload", seconds=2, times=1)
    process = start_merge()
    wait_for(s3, "CreateMultipartUpload", process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert (visible(s3), hidden(s3), own_uploads(s3)) == ([], [], [])


@pytest.mark.parametrize("op", ["UploadPart", "CompleteMultipartUpload"])
def test_after_a_kill_the_same_command_succeeds_and_clears_up(s3: S3Server, models: Path, op: str) -> None:
    add_neighbors(s3)
    # Of two completions the second waits, so that the kill comes between them.
    s3.fault(kind="slow", op=f"{op}$", seconds=5, times=10**6, skip=1 if op.startswith("Complete") else 0)
    process = start_merge()
    wait_for(s3, op, process)
    process.kill()
    process.communicate(timeout=60)
    assert not any(key.endswith(("config.json", "index.json", "manifest.json")) for key in visible(s3))
    s3.faults.clear()
    report = merge()
    assert is_whole(s3, models)
    assert not hidden(s3)
    assert neighbors_are_there(s3)
    # Of what was uploaded the records tell how much it was; parts that were under way are in none.
    assert ("LF813" in [one.code for one in report.findings]) == (op == "CompleteMultipartUpload")


def test_resume_takes_over_the_parts_that_the_store_still_has(s3: S3Server, models: Path) -> None:
    s3.fault(kind="slow", op="CompleteMultipartUpload", seconds=60, times=10**6)
    process = start_merge("--resume")
    wait_for(s3, "CompleteMultipartUpload", process)
    process.kill()
    process.communicate(timeout=60)
    s3.faults.clear()
    since = len(s3.log)
    merge(resume=True)
    assert is_whole(s3, models)
    assert s3.moved(since, op="UploadPart$")["requests"] == 0
    assert s3.moved(since, op="UploadPartCopy")["requests"] == 0


def test_resume_makes_a_file_again_whose_parts_are_others(s3: S3Server, models: Path) -> None:
    s3.fault(kind="slow", op="CompleteMultipartUpload", seconds=60, times=10**6)
    process = start_merge("--resume")
    wait_for(s3, "CompleteMultipartUpload", process)
    process.kill()
    process.communicate(timeout=60)
    s3.faults.clear()
    for upload in s3.multiparts.values():
        if upload["key"].endswith(FILES[0]):
            upload["parts"][1].etag = "0" * 32
    merge(resume=True)
    assert is_whole(s3, models)


# Verbs


def test_what_merge_wrote_is_verified_there(s3: S3Server) -> None:
    merge()
    assert verify(OUT, base=BASE).ok
    data = bytearray(s3.get("models", f"out/{FILES[0]}"))
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little") + head[EDITED]["data_offsets"][0]
    data[begin] ^= 1
    s3.put("models", f"out/{FILES[0]}", bytes(data))
    assert not verify(OUT).ok


def test_bytes_that_nobody_read_are_not_called_ok(s3: S3Server) -> None:
    report = merge()
    assert isinstance(report.data, loraformat.MergeResult)
    assert set(report.data.files) == {key.removeprefix("out/") for key in visible(s3)}
    assert {path.rpartition("/")[2] for path in report.written} == {key.rpartition("/")[2] for key in visible(s3)}
    alone = verify(OUT)
    assert alone.ok
    assert "OK" not in render_all([alone], "text")
    assert "no differences in what was compared" in render_all([alone], "text")
    assert "copied from the base and without digests" in render_all([alone], "text")
    assert ": OK, " in render_all([verify(OUT, base=BASE)], "text")


def test_sha256_and_full_verification_read_everything(s3: S3Server, models: Path) -> None:
    merge(digests="sha256", verify="full")
    record = json.loads(output(s3)["loraformat.digests.json"])
    assert set(FILES) <= {name for name, one in record["files"].items() if "sha256" in one}
    assert verify(OUT, base=BASE).ok


def test_a_base_in_a_folder_is_sent_and_one_in_a_bucket_is_fetched(s3: S3Server, models: Path, tmp_path: Path) -> None:
    loraformat.merge(models / "base", [ADAPTER], OUT)
    found, wanted = output(s3), {path.name: path.read_bytes() for path in (models / "out").iterdir()}
    assert found == wanted
    loraformat.merge(BASE, [models / "adapter"], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == wanted


def test_tensors_at_other_offsets_in_other_files_are_copied_too(s3: S3Server, models: Path, tmp_path: Path) -> None:
    loraformat.merge(models / "base", [models / "adapter"], tmp_path / "out", max_shard_nbytes=9 * MIB)
    merge(max_shard_nbytes=9 * MIB)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert output(s3) == {name: data for name, data in wanted.items() if name != "loraformat.digests.json"}
    assert s3.moved(op="UploadPartCopy")["copied"] >= 4 * MIB


def test_adapters_are_converted_scaled_and_compared_in_a_bucket(s3: S3Server, models: Path, tmp_path: Path) -> None:
    loraformat.convert(ADAPTER, "s3://models/native", to="native", check_roundtrip=True)
    loraformat.convert(models / "adapter", tmp_path / "native", to="native")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "native").iterdir()}
    assert output(s3, "native/") == wanted
    loraformat.scale(ADAPTER, "s3://models/half", weight=0.5)
    assert diff(ADAPTER, "s3://models/half").ok
    assert loraformat.inspect("s3://models/adapter/adapter_model.safetensors").format == "peft"


def test_models_are_unmerged_and_extracted_in_a_bucket(s3: S3Server) -> None:
    merge()
    loraformat.unmerge(OUT, [ADAPTER], "s3://models/back", base=BASE)
    assert output(s3, "back/")[FILES[0]] == s3.get("models", f"base/{FILES[0]}")
    loraformat.extract(BASE, OUT, "s3://models/extracted", rank=4)
    assert loraformat.validate("s3://models/extracted", base=BASE).ok


# Several processes


def test_files_of_several_processes_become_one_output(empty: S3Server) -> None:
    word, data = "0123456789abcdef" * 2, {name: os.urandom(6 * MIB) for name in ("a.bin", "b.bin")}
    for name in ("a.bin", "b.bin", "a.bin"):  # one of them twice: the last upload is the one that holds
        with join(OUT, word, overwrite=False) as shared, shared.create(name, 6 * MIB) as writer:
            writer.write(data[name])
    assert visible(empty) == []
    with pytest.raises(StorageError, match="no rank of this run"), stage(OUT, overwrite=False, word="f" * 16):
        raise AssertionError("unreachable")
    with stage(OUT, overwrite=False, word=word) as finished:
        assert finished.read("b.bin", 1000, 10) == data["b.bin"][1000:1010]
        with finished.create("last.json", 2) as writer:
            writer.write(b"{}")
    assert output(empty) == {**data, "last.json": b"{}"}
    assert own_uploads(empty) == []
    assert open_store(OUT).files() == {"a.bin": 6 * MIB, "b.bin": 6 * MIB, "last.json": 2}


def test_an_unfinished_output_is_kept_when_finishing_it_fails(empty: S3Server) -> None:
    word = "0123456789abcdef"
    with join(OUT, word, overwrite=False) as shared, shared.create("a.bin", 6 * MIB) as writer:
        writer.write(bytes(6 * MIB))
    with pytest.raises(ZeroDivisionError), stage(OUT, overwrite=False, word=word):
        raise ZeroDivisionError
    with stage(OUT, overwrite=False, word=word) as finished:
        assert finished.files() == {"a.bin": 6 * MIB}
    assert output(empty) == {"a.bin": bytes(6 * MIB)}
