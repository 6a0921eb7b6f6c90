"""A bucket with a base and an adapter in it, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_models import make_models
from s3_server import S3Server

from loraformat.storage.s3 import client


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/, and out/: their merge on this machine."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server with one bucket, `models`, and nothing in it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(client, "_clients", [])
    with S3Server(str(tmp_path / "server")) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server
    for made in client._clients:
        for each in (made.quick, made.patient, made.brief):
            each.close()


@pytest.fixture
def s3(empty: S3Server, models: Path) -> S3Server:
    """A server with s3://models/base and s3://models/adapter."""
    empty.put_folder("models", "base", str(models / "base"))
    empty.put_folder("models", "adapter", str(models / "adapter"))
    return empty
