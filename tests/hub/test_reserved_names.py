"""A base of the Hub with a file that Windows cannot have, merged there: refused before anything is computed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_repositories import Hub
from storage import windows_locks

import loraformat
from loraformat.errors import StorageError
from loraformat.storage import platform
from loraformat.storage.platform import Windows

BASE, ADAPTER = "hf://acme/base", "hf://acme/adapter"


@pytest.fixture
def on_windows(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file on the Hub that only other systems can store."""
    files = {name: online.read("acme/base", name) for name in online.files("acme/base")}
    online.put("acme/base", {**files, "aux.json": b"{}"})
    monkeypatch.setitem(sys.modules, "msvcrt", windows_locks)
    monkeypatch.setattr(platform, "PLATFORM", Windows())


@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"rank": 0, "world": 2}], ids=["whole", "dry", "share"])
def test_a_merge_into_a_folder_is_refused_before_it_is_begun(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    computed: list[int] = []
    with pytest.raises(StorageError, match=r'"aux\.json" cannot be a file name on Windows: AUX is a device') as caught:
        loraformat.merge(
            BASE, [ADAPTER], tmp_path / "outputs" / "out", progress=lambda done, _: computed.append(done), **options
        )
    assert caught.value.where == str(tmp_path / "outputs" / "out")
    assert computed == []
    assert os.listdir(tmp_path / "outputs") == []


@pytest.mark.usefixtures("on_windows", "nothing_left")
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_merge_to_the_hub_is_refused_before_it_is_begun(dry_run: bool, online: Hub) -> None:
    """Its files are collected on this machine."""
    computed: list[int] = []
    with pytest.raises(StorageError, match="AUX is a device"):
        loraformat.merge(
            BASE, [ADAPTER], "hf://tester/merged", progress=lambda done, _: computed.append(done), dry_run=dry_run
        )
    assert computed == []
    assert "tester/merged" not in online.repositories
