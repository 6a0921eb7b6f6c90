"""A real S3 service: Ceph's gateway. What it answers, and merges in it. `make test-s3`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3_contract
from ceph import ceph, fetch, packages_folder
from s3_models import expected
from s3_server import S3Server

import loraformat
from loraformat.errors import StorageError
from loraformat.storage.s3 import client

pytestmark = pytest.mark.s3

# What Ceph 16.2.15 answers otherwise than S3. None of it may matter to an output; the first is a matter of time.
OTHERWISE = {
    "range_is_quick",
    "body_with_wrong_crc32",
    "body_with_wrong_sha256",
    "parts_out_of_order",
    "copy_of_a_source_that_changed",
    "complete_only_once",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Iterator[Any]:
    """A boto3 client; loraformat's own asks the same service."""
    del server  # its environment is replaced
    fetch(packages_folder())
    tree = packages_folder() / "tree"
    with ceph(tmp_path_factory.mktemp("ceph"), tree) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(client, "_clients", [])
        yield boto3.client("s3")


@pytest.fixture(scope="module")
def bucket(service: Any, models: Path) -> str:
    service.create_bucket(Bucket="models")
    for folder in ("base", "adapter"):
        for path in (models / folder).iterdir():
            service.put_object(Bucket="models", Key=f"{folder}/{path.name}", Body=path.read_bytes())
    return "models"


def output(service: Any, prefix: str) -> dict[str, bytes]:
    keys = [one["Key"] for one in service.list_objects_v2(Bucket="models", Prefix=f"{prefix}/").get("Contents", [])]
    return {key.removeprefix(f"{prefix}/"): service.get_object(Bucket="models", Key=key)["Body"].read() for key in keys}


def test_ceph_answers_the_contract_as_far_as_is_known(service: Any) -> None:
    assert s3_contract.run() <= OTHERWISE


def test_a_merge_in_ceph(service: Any, bucket: str, models: Path) -> None:
    loraformat.merge("s3://models/base", ["s3://models/adapter"], "s3://models/out")
    assert output(service, "out") == expected(models)
    assert "Uploads" not in service.list_multipart_uploads(Bucket="models")
    loraformat.merge("s3://models/base", ["s3://models/adapter"], "s3://models/out", overwrite=True)
    assert output(service, "out") == expected(models)
    assert "Uploads" not in service.list_multipart_uploads(Bucket="models")


def test_a_base_that_is_replaced_is_noticed_though_ceph_heeds_no_condition_on_copies(
    service: Any, bucket: str, models: Path
) -> None:
    seen: list[str] = []

    def replace(**_: Any) -> None:
        if not seen:
            key = "base/model-00001-of-00002.safetensors"
            seen.append(key)
            data = bytearray((models / "base" / key.rpartition("/")[2]).read_bytes())
            data[-1000:] = bytes(1000)
            service.put_object(Bucket="models", Key=key, Body=bytes(data))

    client.connected().patient.meta.events.register("before-send.s3.UploadPartCopy", replace)
    with pytest.raises(StorageError, match="changed while it was in use"):
        loraformat.merge("s3://models/base", ["s3://models/adapter"], "s3://models/changed")
    assert seen
    assert output(service, "changed") == {}
    assert "Uploads" not in service.list_multipart_uploads(Bucket="models")
