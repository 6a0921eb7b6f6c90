"""s3:// addresses, read: what is listed, what is asked for, and answers that are not what was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from s3_server import S3Server

import loraformat
from loraformat.cli import main
from loraformat.errors import LoraFormatError, StorageError
from loraformat.storage import open_store, uri_of
from loraformat.storage.s3 import store as s3_store
from loraformat.storage.s3.address import normalized
from loraformat.storage.s3.client import ATTEMPTS

BYTES = bytes(range(256)) * 2048  # 512 KiB


@pytest.fixture
def bucket(empty: S3Server) -> S3Server:
    empty.put("models", "base/a", BYTES)
    empty.put("models", "base/b", b"b")
    return empty


def test_a_folder_has_its_own_files_and_none_of_its_neighbors(bucket: S3Server) -> None:
    bucket.put("models", "base/", b"")
    bucket.put("models", "base/sub/c", b"c")
    bucket.put("models", "base/.hidden/d", b"d")
    bucket.put("models", "base-old/a", b"old")
    bucket.put("models", "base/.loraformat-lock", b"{}")
    found = open_store("s3://models/base")
    assert found.files() == {"a": len(BYTES), "b": 1}
    assert found.folders() == ("sub",)
    assert open_store("s3://models/base/").files() == found.files()
    assert open_store("S3://models/base/sub").files() == {"c": 1}


def test_lists_of_more_than_a_page_are_whole(empty: S3Server) -> None:
    for number in range(1203):
        empty.put("models", f"many/{number:05}", b"x")
    assert len(open_store("s3://models/many").files()) == 1203


@pytest.mark.parametrize("name", ["a b", "a+b", "100%", "a&b=c", "über", "it's", "#1", "a?b"])
def test_names_that_urls_spell_otherwise(empty: S3Server, name: str) -> None:
    empty.put("models", f"dir {name}/{name}", b"here")
    found = open_store(f"s3://models/dir {name}")
    assert found.files() == {name: 4}
    assert found.read(name) == b"here"


def test_one_object_is_a_single_file(bucket: S3Server) -> None:
    found = open_store("s3://models/base/b")
    assert found.is_single_file
    assert (found.files(), found.read("b")) == ({"b": 1}, b"b")


def test_ranges_cost_what_they_hold_and_heads_are_kept(bucket: S3Server) -> None:
    found = open_store("s3://models/base")
    since = len(bucket.log)
    assert found.read("a", 300_000, 5) == BYTES[300_000:300_005]
    assert found.read("a", 8, 100) == BYTES[8:108]
    assert found.read("a", 200, 1000) == BYTES[200:1200]
    rows = [(row["op"], row["range"]) for row in bucket.log[since:]]
    assert rows == [("GetObject", "bytes=300000-300004"), ("GetObject", "bytes=0-131071")]


def test_an_object_that_is_replaced_is_an_error(bucket: S3Server) -> None:
    found = open_store("s3://models/base")
    bucket.put("models", "base/a", BYTES[::-1])
    with pytest.raises(StorageError, match="changed while it was in use"):
        found.read("a", 300_000, 5)


def test_where_conditions_are_not_heeded_the_etag_tells(bucket: S3Server) -> None:
    bucket.ignores.add("If-Match")
    found = open_store("s3://models/base")
    bucket.put("models", "base/a", BYTES[::-1])
    with pytest.raises(StorageError, match="changed while it was in use"):
        found.read("a", 300_000, 5)


def test_a_body_that_breaks_off_is_asked_for_again_from_there(bucket: S3Server) -> None:
    bucket.fault(kind="truncate", op="GetObject", times=3)
    found = open_store("s3://models/base")
    buffer = bytearray(400_000)
    found.read_into("a", 100, buffer)
    assert bytes(buffer) == BYTES[100:400_100]
    assert len([row for row in bucket.log if row["op"] == "GetObject"]) == 4


def test_a_body_that_breaks_off_every_time_is_one_error(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "_PAUSE_S", 0.001)
    bucket.fault(kind="truncate", op="GetObject", times=10**6, part=0.0)
    with pytest.raises(StorageError, match=r"s3://models/base/a: the answer was too slow or broke off"):
        open_store("s3://models/base").read("a", 200_000)


def test_an_answer_that_is_too_slow_is_an_error(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "_PATIENCE_S", -10)
    monkeypatch.setattr(s3_store, "_BLOCK_NBYTES", 10)
    with pytest.raises(StorageError, match="too slow"):
        open_store("s3://models/base").read("a", 200_000)


def test_a_server_without_ranges_serves_whole_objects_only(bucket: S3Server) -> None:
    bucket.fault(kind="whole", op="GetObject", times=10**6)
    found = open_store("s3://models/base")
    assert found.read("b") == b"b"
    with pytest.raises(StorageError, match="does not support range requests"):
        found.read("a", 300_000, 5)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://nowhere/base", "no such bucket"),
        ("s3://models/none", "no such prefix or object"),
        ("s3://models/base/../other", "which object stores do not resolve"),
        ("s3://models//base", "an empty part"),
        ("s3://", "not the name of a bucket"),
        ("s3://a", "not the name of a bucket"),
    ],
)
def test_what_is_not_there_is_said_with_its_address(bucket: S3Server, uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_store(uri)
    assert uri in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:SECRET/KEY@models/base",
        "s3://AKIA:SECRET@models/base",
        "s3://SECRET@models/base",
        "https://user:SECRET@host/base",
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(LoraFormatError, match="must not contain credentials") as caught:
        uri_of(uri)
    assert "SECRET" not in str(caught.value)


def test_arns_of_access_points_are_no_credentials() -> None:
    arn = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
    for read in (normalized, loraformat.inspect):
        with pytest.raises(StorageError, match="ARNs of access points are not supported"):
            read(f"s3://{arn}")


def test_the_place_of_an_unfinished_output_is_not_an_address(bucket: S3Server) -> None:
    with pytest.raises(StorageError, match="only its own run may open"):
        loraformat.inspect("s3+unfinished://0123456789abcdef/models/base")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("name", ["boto3", "botocore.config", "s3transfer", "boto3.s3.transfer"])
def test_a_part_of_boto3_that_is_missing(name: str) -> None:
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from loraformat.cli import main\n"
        "main(['inspect', 's3://models/base'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "an s3:// address needs boto3" in run.stderr
    assert "loraformat[s3]" in run.stderr
    assert run.returncode not in (0, 70)


def test_addresses_have_one_spelling() -> None:
    assert normalized("s3://models/base//") == normalized("S3://models/base") == "s3://models/base"
    assert normalized("s3://models/") == "s3://models"


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("AccessDenied", 403, "access denied"),
        ("ExpiredToken", 400, "rejected the credentials"),
        ("InternalError", 500, f"busy, tried {ATTEMPTS} times"),
        ("Odd\u202eCode", 418, "refused the request"),
    ],
)
def test_answers_of_the_service_are_named_by_their_codes(
    bucket: S3Server, code: str, status: int, message: str
) -> None:
    found = open_store("s3://models/base")
    bucket.fault(kind="status", op="GetObject", times=10**6, code=status, error=code)
    with pytest.raises(StorageError, match=message) as caught:
        found.read("a", 200_000)
    assert "s3://models/base/a" in str(caught.value)
    assert "\u202e" not in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_a_wrong_secret_is_not_printed(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongWRONG")
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as caught:
        open_store("s3://models/base")
    assert "wrongWRONG" not in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_a_token_with_a_line_break_is_not_printed(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "tokenTOKEN\nline")
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        open_store("s3://models/base")
    assert "tokenTOKEN" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.usefixtures("fresh")
def test_without_credentials_the_chain_is_named(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials"):
        open_store("s3://models/base")


@pytest.mark.usefixtures("fresh")
def test_where_nothing_listens_it_is_said_soon(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="cannot be reached"):
        open_store("s3://models/base")


def test_a_command_line_that_is_an_address_with_credentials_does_not_repeat_them() -> None:
    found = CliRunner().invoke(main, ["s3://AKIA:SECRET@models/base"])
    assert found.exit_code == 2
    assert "SECRET" not in found.output
    assert "must not contain credentials" in found.output
