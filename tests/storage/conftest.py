"""A Hub for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub

ADAPTER = Path(__file__).parent.parent.parent / "fixtures" / "bad" / "LF302-shape-mismatch"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for path in (ADAPTER / "base").iterdir():
            server.files[path.name] = path.read_bytes()
        # Weights that must not be fetched: the header says where they are, and that is all that is needed.
        weights = server.files["model.safetensors"]
        server.files["sub/model.safetensors"] = weights
        server.files["big.bin"] = bytes(5_000_000)
        yield server
        server.done.set()
        server.shutdown()
