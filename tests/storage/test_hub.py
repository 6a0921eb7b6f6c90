"""hf:// addresses, against a server on this machine that speaks as much of the Hub as is asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub

from loraformat.errors import StorageError
from loraformat.storage import open_store
from loraformat.storage.hub import CachedRepository

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER = FIXTURES / "bad" / "LF302-shape-mismatch"


def environment(hub: Hub, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def validate(hub: Hub, base: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraformat", "validate", str(ADAPTER / "adapter"), "--base", base, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(hub, **more), check=False)


@pytest.mark.parametrize("address", ["hf://org/base", "hf://org/base@v1", f"hf://org/base@{COMMIT}"])
def test_a_base_on_the_hub_gives_what_the_same_folder_gives(hub: Hub, address: str) -> None:
    there = validate(hub, address, "--format", "json")
    here = validate(hub, str(ADAPTER / "base"), "--format", "json")
    assert there.returncode == here.returncode == 1, there.stderr
    documents = [json.loads(each.stdout) for each in (there, here)]
    mismatches = [[f for f in each["findings"] if f["code"] == "LF302"] for each in documents]
    assert mismatches[0] == mismatches[1] != []
    assert documents[0]["data"]["base"] == f"hf://org/base@{COMMIT}"


def test_only_headers_are_fetched_by_commit_and_each_once(hub: Hub) -> None:
    padding = bytes(20_000_000)
    header = json.loads((weights := hub.files["model.safetensors"])[8 : 8 + int.from_bytes(weights[:8], "little")])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["padding"] = {"dtype": "U8", "shape": [len(padding)], "data_offsets": [end, end + len(padding)]}
    text = json.dumps(header).encode()
    hub.files["model.safetensors"] = len(text).to_bytes(8, "little") + text + weights[-end:] + padding
    assert validate(hub, "hf://org/base").returncode == 1
    files = [path.partition(f"{COMMIT}/")[2] for path, _ in hub.asked if "/resolve/" in path]
    assert sorted(files) == ["config.json", "model.safetensors"]
    assert all(wanted for path, wanted in hub.asked if "/resolve/" in path)
    assert hub.sent < 200_000


def test_a_folder_of_a_repository_is_a_base_too(hub: Hub) -> None:
    assert "LF302" in validate(hub, "hf://org/base/sub").stdout
    missing = validate(hub, "hf://org/base/other")
    assert missing.returncode == 3
    assert "no such folder" in missing.stderr


def test_a_repository_that_is_not_there_is_told_without_the_token(hub: Hub) -> None:
    done = validate(hub, "hf://org/nothing")
    assert done.returncode == 3
    assert "no such repository" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_server_without_ranges_is_refused_rather_than_downloaded(hub: Hub) -> None:
    hub.serves_ranges = False
    hub.files["model.safetensors"] += bytes(1_000_000)
    done = validate(hub, "hf://org/base")
    assert done.returncode == 3
    assert "range requests" in done.stderr


def test_offline_means_offline(hub: Hub, tmp_path: Path) -> None:
    done = validate(hub, "hf://org/base", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 3
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "hf download org/base" in done.stderr
    assert hub.asked == []


@pytest.mark.parametrize(
    "address", ["hf://org/base", f"hf://org/base@{COMMIT}", "hf://org/base@v1", "hf://org/base/sub"]
)
def test_offline_what_the_cache_has_is_read(hub: Hub, tmp_path: Path, address: str) -> None:
    """As the Hub's own tools lay it out: names in snapshots are links into blobs."""
    cache = tmp_path / "hub" / "models--org--base"
    snapshot = cache / "snapshots" / COMMIT
    for number, (name, data) in enumerate(hub.files.items()):
        blob, link = cache / "blobs" / f"{number}", snapshot / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for branch in ("main", "v1"):
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(COMMIT)
    done = validate(hub, address, "--format", "json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert [f for f in document["findings"] if f["code"] == "LF302"]
    assert document["data"]["base"].startswith(f"hf://org/base@{COMMIT}")
    assert hub.asked == []


def test_nothing_is_written_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    store = CachedRepository(f"hf://org/base@{COMMIT}")
    assert store.read("config.json") == b"{}"
    with pytest.raises(StorageError, match="never written to"):
        store.create("config.json")
    with pytest.raises(StorageError, match="nothing is ever removed"):
        store.remove("config.json")
    with pytest.raises(StorageError, match="never written to"):
        store.subfolder("unet")
    (snapshot / "vae").mkdir()
    with pytest.raises(StorageError, match="nothing is ever removed"):
        store.remove_folder("vae")
    assert store.below("vae").files() == {}
    (snapshot / "vae").rmdir()
    assert os.listdir(snapshot) == ["config.json"]


def test_no_connection_is_told(hub: Hub) -> None:
    done = validate(hub, "hf://org/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 3
    assert "the Hub cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "address", ["hf://", "hf://one", "hf://a/b/../c", "hf://../b", "hf://a/b@", "hf://a/b c?d/../.."]
)
def test_what_is_no_address_is_told_without_asking(address: str) -> None:
    with pytest.raises(StorageError):
        open_store(address)


def test_an_adapter_on_the_hub_can_be_inspected(hub: Hub) -> None:
    hub.files = {path.name: path.read_bytes() for path in (ADAPTER / "adapter").iterdir()}
    command = [sys.executable, "-m", "loraformat", "inspect", "hf://org/base"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub), check=False)
    assert done.returncode == 0, done.stderr
    assert "rank       2" in done.stdout


def test_a_name_of_the_hub_without_its_scheme_is_not_asked_for_there() -> None:
    with pytest.raises(StorageError) as caught:
        open_store("org/base")
    assert caught.value.hint == "for the Hub, write hf://org/base"


@pytest.mark.parametrize("address", ["org/base", "org/base@v1"])
def test_a_plain_name_is_offered_as_an_address_of_the_hub(address: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_store(address)
    assert f"hf://{address}" in caught.value.hint
