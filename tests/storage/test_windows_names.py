"""File names that mean something else on Windows are refused there: devices, drives, streams, other names."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hub_server import COMMIT, Hub

from loraformat.errors import StorageError
from loraformat.storage import LocalStore, check_output, join, platform, stage
from loraformat.storage.hub.addresses import Address
from loraformat.storage.hub.cached import CachedRepository
from loraformat.storage.hub.repository import HubStore, _cached_folder
from loraformat.storage.platform import Platform, Posix, Windows

# Microsoft, "Naming Files, Paths, and Namespaces".
REFUSED = {
    "config.json:stream": "a colon",
    "C:config.json": "a colon",
    "config.json.": "a dot or a space at the end",
    "config.json ": "a dot or a space at the end",
    "CON": "CON is a device",
    "aux.json": "AUX is a device",
    "Nul.tar.gz": "NUL is a device",
    "prn .txt": "PRN is a device",
    "com1": "COM1 is a device",
    "LPT9.md": "LPT9 is a device",
    "COM¹.txt": "COM¹ is a device",
    "conin$": "CONIN[$] is a device",
    "CONOUT$.log": "CONOUT[$] is a device",
    "what?.json": 'it contains "[?]"',
    "a\nb": r'it contains "\\x0a"',
    "a\\b": "single path component",
    "a/b": "single path component",
}
ALLOWED = ("COM10", "com", "console.json", "auxiliary.json", "nul-model.safetensors", ".gitattributes", "a b.c", "é")


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "PLATFORM", Windows())


@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_such_a_name_is_neither_written_nor_read(name: str, tmp_path: Path) -> None:
    if "/" not in name:
        (tmp_path / name).write_bytes(b"of somebody else")
    before = os.listdir(tmp_path)
    store = LocalStore(str(tmp_path))
    with pytest.raises(StorageError, match=REFUSED[name]) as caught, store.create(name):
        pass
    assert caught.value.where == str(tmp_path)
    for call in (store.read, store.remove, store.remove_folder, store.below, store.check_target, store.check_inside):
        with pytest.raises(StorageError, match=REFUSED[name]):
            call(name)
    with pytest.raises(StorageError, match=REFUSED[name]), store.subfolder(name):
        pass
    assert os.listdir(tmp_path) == before


@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize("name", ALLOWED)
def test_other_names_are_written(name: str, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with store.create(name, 1) as writer:
        writer.write(b"x")
    assert store.read(name) == b"x"


@pytest.mark.parametrize("name", ["aux.json", "config.json:stream", "what?", "end."])
def test_elsewhere_they_are_names_as_any(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "PLATFORM", Posix())
    store = LocalStore(str(tmp_path))
    with store.create(name, 1) as writer:
        writer.write(b"x")
    assert store.read(name) == b"x"


@pytest.mark.usefixtures("on_windows")
def test_an_output_that_would_have_such_a_file_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    target, names = str(tmp_path / "out"), ("text_encoder/", "text_encoder/nul.json")
    with pytest.raises(StorageError, match="NUL is a device") as caught:
        check_output(target, overwrite=False, names=names)
    assert "rename it where it comes from" in (caught.value.hint or "")
    with pytest.raises(StorageError, match="NUL is a device"), stage(target, overwrite=False, names=names):
        pass
    with (
        pytest.raises(StorageError, match="NUL is a device"),
        join(target, "0123456789abcdef", overwrite=False, names=names),
    ):
        pass
    assert os.listdir(tmp_path) == []
    check_output(target, overwrite=False, names=("text_encoder/", "text_encoder/config.json"))


@pytest.mark.parametrize(("folder", "reason"), [("aux", "AUX is a device"), ("sub.", "a dot"), ("a:b", "a colon")])
def test_a_path_in_a_repository_does_not_lead_out_of_the_cache(
    folder: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    inner = tmp_path / "models--org--base" / "snapshots" / COMMIT / folder
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    address = Address("org/base", COMMIT, folder)
    assert CachedRepository(str(address)).read("config.json") == b"{}"
    monkeypatch.setattr(platform, "PLATFORM", Windows())
    with pytest.raises(StorageError, match=f'"{folder}" cannot be a file name on Windows: {reason}'):
        CachedRepository(str(address))
    assert _cached_folder(address, "config.json", 2) is None


@pytest.mark.parametrize("system", [Posix(), Windows()])
@pytest.mark.parametrize("name", ["C:config.json", "aux.json", "config.json:x"])
def test_a_file_that_the_cache_cannot_have_is_read_at_the_hub(
    name: str, system: Platform, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(platform, "PLATFORM", system)
    hub.files |= {name: b"{}", quote(name): b"{}"}  # as it is listed, and as it is asked for
    store = HubStore("hf://org/base", endpoint=hub.endpoint)
    assert store.read(name) == b"{}"
