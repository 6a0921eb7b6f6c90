"""A bucket with a base and an adapter in it, for the tests of this folder."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests, so that they can share boto3's clients, which take a second to make."""
    folder = tmp_path_factory.mktemp("server")
    with S3Server(str(folder / "objects")) as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
        patch.setattr(client, "_clients", [])
        for name, value in server.env().items():
            patch.setenv(name, value)
        yield server
        close(client._clients)


def close(clients: list[client.Client]) -> None:
    for made in clients:
        made.traits.clear()
        for each in (made.quick, made.patient, made.brief):
            each.close()


@pytest.fixture
def empty(server: S3Server) -> S3Server:
    """A server with one bucket, `models`, and nothing in it."""
    server.reset()
    for made in client._clients:
        made.traits.clear()
    return server


@pytest.fixture
def fresh(empty: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The configuration is read again."""
    monkeypatch.setattr(client, "_clients", [])
    yield
    close(client._clients)


@pytest.fixture(scope="module")
def few_attempts(server: S3Server) -> Iterator[None]:
    """Requests are given up after three attempts: a storm then takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "ATTEMPTS", 3)
        patch.setattr(client, "_clients", [])
        yield
        close(client._clients)


@pytest.fixture
def s3(empty: S3Server, models: Path) -> S3Server:
    """A server with s3://models/base and s3://models/adapter."""
    empty.put_folder("models", "base", str(models / "base"))
    empty.put_folder("models", "adapter", str(models / "adapter"))
    return empty
