"""What services do wrong, and what happens beside a run: mended, or one error that leaves nothing; never a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_models import FILES, expected
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
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage.s3.address import Address
from loraformat.storage.s3.client import connected
from loraformat.storage.s3.locks import locked

FIRST, SECOND = FILES
FOREVER = 10**6


pytestmark = pytest.mark.usefixtures("few_attempts")

MENDED: dict[str, list[dict[str, Any]]] = {
    "an error in an answer of 200 to Complete": [{"kind": "error200", "op": "CompleteMultipartUpload"}],
    "an error in an answer of 200 to a copy": [{"kind": "error200", "op": "UploadPartCopy"}],
    "the answer to Complete is lost": [{"kind": "lost", "op": "CompleteMultipartUpload"}],
    "the answer to Create is lost": [{"kind": "lost", "op": "CreateMultipartUpload"}],
    "the answer to the lock is lost": [{"kind": "lost", "op": "PutObject", "key": "lock"}],
    "the answer to the first record is lost": [{"kind": "lost", "op": "PutObject", "key": "upload-model"}],
    "the answer to the manifest is lost": [{"kind": "lost", "op": "PutObject", "key": "manifest"}],
    "the answer to a part is lost": [{"kind": "lost", "op": "UploadPart$"}],
    "the answer to a copy is lost": [{"kind": "lost", "op": "UploadPartCopy"}],
    "the answer to a removal is lost": [{"kind": "lost", "op": "DeleteObject"}],
    "connections are reset": [{"kind": "reset", "op": op} for op in ("HeadObject", "ListObjects", "UploadPartCopy")],
    "bodies break off": [{"kind": "truncate", "op": "GetObject", "skip": skip} for skip in (0, 3, 7)],
    "the store is busy": [{"kind": "status", "op": op} for op in ("Complete", "UploadPart$", "List", "DeleteObject")],
}


@pytest.mark.parametrize("faults", MENDED.values(), ids=MENDED)
def test_mended(s3: S3Server, models: Path, faults: list[dict[str, Any]]) -> None:
    add_neighbors(s3)
    made = [s3.fault(**fault) for fault in faults]
    merge()
    assert all(fault["times"] == 0 for fault in made)
    assert is_whole(s3, models)
    assert neighbors_are_there(s3)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented")])
def test_a_store_that_does_not_copy_is_given_the_bytes_and_it_is_said_once(
    s3: S3Server, models: Path, status: int, code: str
) -> None:
    s3.fault(kind="status", op="UploadPartCopy", times=FOREVER, code=status, error=code)
    report = merge()
    assert is_whole(s3, models)
    assert [(one.code, code in one.message) for one in report.findings if one.code == "LF826"] == [("LF826", True)]


@pytest.mark.parametrize(
    "ignored",
    [
        {"If-None-Match"},
        {"If-Match"},
        {"x-amz-checksum-crc32", "x-amz-checksum-algorithm"},
        {"If-None-Match", "If-Match", "x-amz-copy-source-if-match", "x-amz-checksum-crc32"},
    ],
    ids=lambda ignored: " ".join(sorted(ignored)),
)
def test_stores_that_know_less_get_the_same_output(s3: S3Server, models: Path, ignored: set[str]) -> None:
    s3.ignores |= ignored
    merge()
    assert is_whole(s3, models)
    assert not hidden(s3)


def test_etags_that_are_not_made_of_md5s(s3: S3Server, models: Path) -> None:
    """As where a bucket encrypts with a key of KMS."""
    s3.has_other_etags = True
    s3.fault(kind="status", op="PutObject", key="out/config.json", times=FOREVER, code=403, error="AccessDenied")
    refused(s3, "s3://models/out")
    s3.faults.clear()
    merge()
    assert is_whole(s3, models)
    merge(overwrite=True)
    assert is_whole(s3, models)
    assert not hidden(s3)


def changed(s3: S3Server, models: Path, file: str) -> Callable[[S3Server], None]:
    data = bytearray((models / "base" / file).read_bytes())
    data[-1000:] = bytes(1000)
    return lambda server: server.put("models", f"base/{file}", bytes(data))


def test_a_file_that_is_replaced_before_it_is_copied(s3: S3Server, models: Path) -> None:
    s3.fault(kind="call", op="CreateMultipartUpload", function=changed(s3, models, FIRST))
    refused(s3, "changed while it was in use")


def test_a_file_that_is_replaced_where_the_store_ignores_conditions(s3: S3Server, models: Path) -> None:
    s3.ignores |= {"x-amz-copy-source-if-match", "If-Match"}
    s3.fault(kind="call", op="CompleteMultipartUpload|UploadPart$", function=changed(s3, models, FIRST))
    refused(s3, "changed while it was in use")


def test_an_object_that_somebody_else_puts_meanwhile_stays(s3: S3Server) -> None:
    put = {"key": f"out/{SECOND}", "function": lambda one: one.put("models", f"out/{SECOND}", b"his")}
    s3.fault(kind="call", op="CompleteMultipartUpload", **put)
    with pytest.raises(StorageError, match="somebody else created this object"):
        merge()
    assert output(s3) == {SECOND: b"his"}
    assert not own_uploads(s3)


def test_a_lock_that_somebody_else_takes_ends_the_run(s3: S3Server) -> None:
    s3.fault(
        kind="call",
        op="CompleteMultipartUpload",
        function=lambda one: one.put("models", "out/.loraformat-lock", b'{"word": "other"}'),
    )
    with pytest.raises(StorageError, match="another run has taken the lock"):
        merge()
    assert visible(s3) == []
    assert s3.get("models", "out/.loraformat-lock") == b'{"word": "other"}'


def test_uploads_that_somebody_else_ends(s3: S3Server) -> None:
    s3.fault(kind="call", op="CompleteMultipartUpload", function=end_our_uploads)
    refused(s3, "the upload is gone")


def end_our_uploads(server: S3Server) -> None:
    for name in [name for name in server.multiparts if not name.startswith("neighbor")]:
        del server.multiparts[name]


FATAL = {
    "no upload can be completed": {"op": "CompleteMultipartUpload", "code": 500, "error": "InternalError"},
    "no part is taken": {"op": "UploadPart$"},
    "config.json is not taken": {"op": "PutObject", "key": "out/config.json", "code": 403, "error": "AccessDenied"},
    "the manifest is not taken": {"op": "PutObject", "key": "manifest", "code": 500, "error": "InternalError"},
    "no upload can be begun": {"op": "CreateMultipartUpload", "code": 403, "error": "AccessDenied"},
    "the base cannot be read": {"op": "GetObject", "key": f"base/{FIRST}", "skip": 1},
    "records are not taken": {"op": "PutObject", "key": "upload-model", "code": 403, "error": "AccessDenied"},
}


def refused(s3: S3Server, message: str) -> None:
    add_neighbors(s3)
    with pytest.raises(LoraFormatError, match=message):
        merge()
    assert visible(s3) == []
    assert own_uploads(s3) == []
    assert hidden(s3) == []
    assert neighbors_are_there(s3)


@pytest.mark.parametrize("fault", FATAL.values(), ids=FATAL)
def test_fatal_and_then_a_good_run(s3: S3Server, models: Path, fault: dict[str, Any]) -> None:
    s3.fault(kind="status", times=FOREVER, **fault)
    refused(s3, "s3://models")
    s3.faults.clear()
    merge()
    assert is_whole(s3, models)
    assert neighbors_are_there(s3)


def test_what_could_not_be_cleared_up_is_cleared_by_the_next_run(s3: S3Server, models: Path) -> None:
    add_neighbors(s3)
    for op in ("CompleteMultipartUpload", "AbortMultipartUpload", "DeleteObject"):
        s3.fault(kind="status", op=op, times=FOREVER)
    with pytest.raises(StorageError, match="busy"):
        merge()
    assert visible(s3) == []
    assert own_uploads(s3)
    s3.faults.clear()
    merge()
    assert is_whole(s3, models)
    assert neighbors_are_there(s3)


@pytest.mark.parametrize(
    "fault",
    [
        {"op": "UploadPart$"},
        {"op": "CompleteMultipartUpload", "skip": 0},
        {"op": "CompleteMultipartUpload", "skip": 2},  # those of the files beside the old ones go well
        {"op": "PutObject", "key": "-output$", "skip": 1},
        {"op": "UploadPartCopy", "skip": 1},
    ],
    ids=str,
)
def test_an_overwrite_that_fails_leaves_the_old_objects(s3: S3Server, models: Path, fault: dict[str, Any]) -> None:
    merge()
    old = {key: one.etag for key, one in s3.buckets["models"].items() if key.startswith("out/")}
    s3.fault(kind="status", times=FOREVER, code=500, error="InternalError", **fault)
    with pytest.raises(StorageError):
        merge(overwrite=True, dtype="float16")
    assert {key: one.etag for key, one in s3.buckets["models"].items() if key.startswith("out/")} == old
    assert not own_uploads(s3)


def test_an_adapter_whose_overwrite_fails_halfway_is_the_old_one(s3: S3Server) -> None:
    loraformat.convert(ADAPTER, OUT, to="native")
    old = output(s3)
    s3.fault(kind="status", op="PutObject", key="config.json", times=1 + 2, code=500, error="InternalError")
    with pytest.raises(StorageError):
        loraformat.convert(ADAPTER, OUT, to="native", overwrite=True)
    assert output(s3) == old


def test_two_runs_to_one_place(s3: S3Server, models: Path) -> None:
    """The second one finds the lock of the first, and touches nothing."""
    seen: list[str] = []

    def other(server: S3Server) -> None:
        if not seen:
            seen.append("")
            with pytest.raises(StorageError) as caught:
                merge()
            seen[0] = str(caught.value)

    s3.fault(kind="call", op="CreateMultipartUpload", function=other)
    merge()
    assert "in use by pid" in seen[0]
    assert is_whole(s3, models)


def test_an_inner_output_that_is_being_made_is_left_alone(s3: S3Server, models: Path) -> None:
    refused: list[str] = []

    def outer(server: S3Server) -> None:
        with pytest.raises(StorageError) as caught:
            merge()
        refused.append(str(caught.value))

    s3.fault(kind="call", op="UploadPart$", function=outer)
    merge("s3://models/out/inner")
    assert "s3://models/out/inner" in refused[0]
    assert is_whole_at(s3, models, "out/inner/")


def is_whole_at(s3: S3Server, models: Path, prefix: str) -> bool:
    return output(s3, prefix) == expected(models)


CHANGES: dict[str, Callable[[S3Server], object]] = {
    "one that appears": lambda one: one.put("models", "out/his.bin", b"his"),
    "one that changes": lambda one: one.put("models", f"out/{FIRST}", b"his"),
    "one that goes": lambda one: one.buckets["models"].pop(f"out/{FIRST}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_overwrite_during_which_an_object_changes(s3: S3Server, change: Callable[[S3Server], object]) -> None:
    merge()
    s3.fault(kind="call", op="UploadPart$", function=change)
    seen: list[dict[str, bytes]] = []
    s3.fault(kind="call", op="CompleteMultipartUpload", function=lambda _: seen.append(shown(s3)))
    with pytest.raises(StorageError, match="somebody else created, changed or removed this object"):
        merge(overwrite=True)
    assert output(s3) == seen[0]
    assert not own_uploads(s3)


def shown(s3: S3Server) -> dict[str, bytes]:
    return {key.removeprefix("out/"): s3.get("models", key) for key in visible(s3)}


def test_an_object_that_appears_beside_a_new_output(s3: S3Server) -> None:
    s3.fault(kind="call", op="UploadPart$", function=CHANGES["one that appears"])
    with pytest.raises(StorageError, match=r"his\.bin: somebody else created"):
        merge()
    assert output(s3) == {"his.bin": b"his"}


def test_a_lock_that_is_renewed_is_another_object_each_time(s3: S3Server) -> None:
    lost: list[str] = []
    client, address = connected(), Address("models", "out")
    with locked(client, address) as lock:
        for _ in range(2):
            lost.append(s3.buckets["models"]["out/.loraformat-lock"].etag)
            s3.fault(kind="lost", op="PutObject", key="lock", times=1)
            lock.renew()
        lost.append(s3.buckets["models"]["out/.loraformat-lock"].etag)
        lock.check()
    assert len(set(lost)) == 3
    assert not hidden(s3)


def test_the_output_is_not_an_input(s3: S3Server, models: Path) -> None:
    before = {key: one.etag for key, one in s3.buckets["models"].items()}
    for out in ("s3://models/base", "s3://models/base/", "s3://models/base/inner", "S3://models/base"):
        with pytest.raises(StorageError, match="lies inside the input"):
            loraformat.merge(BASE, [ADAPTER], out, overwrite=True)
    with pytest.raises(StorageError, match=r"a whole bucket|lies inside the input"):
        loraformat.merge(BASE, [ADAPTER], "s3://models", overwrite=True)
    assert {key: one.etag for key, one in s3.buckets["models"].items()} == before


def test_what_is_not_an_output_of_a_merge_is_not_replaced(s3: S3Server) -> None:
    s3.put("models", "out/mine.txt", b"mine")
    s3.put("models", "out/config.json", b"{}")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=r"exists already|holds config.json and 1 more"):
            merge(overwrite=overwrite)
    assert output(s3) == {"mine.txt": b"mine", "config.json": b"{}"}
