"""A Hub on this machine for tests in this process, and a base and an adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_models
import pytest
from hub_repositories import TOKEN, Hub, running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, in three files, `adapter`, which changes two of them, and `merged` by a local merge."""
    folder: Path = tmp_path_factory.mktemp("models")
    hub_models.make(folder)
    return folder


@pytest.fixture
def hub(models: Path) -> Iterator[Hub]:
    """With acme/base and acme/adapter."""
    with running() as found:
        found.put_folder("acme/base", models / "base")
        found.put_folder("acme/adapter", models / "adapter")
        found.log.clear()
        yield found


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, for huggingface_hub in this process, and no room for temporary files but one that is looked into."""
    import tempfile

    from huggingface_hub import constants

    values: dict[str, Any] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return hub


@pytest.fixture
def nothing_left(online: Hub, tmp_path: Path) -> Iterator[None]:
    yield
    assert list((tmp_path / "temporary").iterdir()) == []
