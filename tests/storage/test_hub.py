"""hf:// addresses, against a server on this machine that speaks as much of the Hub as is asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loraformat.errors import StorageError
from loraformat.storage import open_store

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER = FIXTURES / "bad" / "LF302-shape-mismatch"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories, and what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.serves_ranges = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.server.asked.append((path, wanted))
        if path in (
            "/api/models/org/base",
            "/api/models/org/base/revision/v1",
            f"/api/models/org/base/revision/{COMMIT}",
        ):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            self.answer(200, json.dumps({"id": "org/base", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/org/base/resolve/{COMMIT}/"):
            data = self.server.files[path.partition(f"{COMMIT}/")[2]]
            if wanted and self.server.serves_ranges:
                first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
                self.answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
            else:
                self.answer(200, data)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in (ADAPTER / "base").iterdir():
            server.files[path.name] = path.read_bytes()
        # Weights that must not be fetched: the header says where they are, and that is all that is needed.
        weights = server.files["model.safetensors"]
        server.files["sub/model.safetensors"] = weights
        server.files["big.bin"] = bytes(5_000_000)
        yield server
        server.shutdown()


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
    assert "parts of files" in done.stderr


def test_offline_means_offline(hub: Hub) -> None:
    done = validate(hub, "hf://org/base", HF_HUB_OFFLINE="1")
    assert done.returncode == 3
    assert "HF_HUB_OFFLINE" in done.stderr
    assert hub.asked == []


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
    assert caught.value.hint == "for the Hub write hf://org/base"
