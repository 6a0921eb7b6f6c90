"""Bytes put aside: several threads may add, what is read is what was added, and no file is left or seen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraformat.errors import StorageError
from loraformat.storage import open_spool


def test_threads_get_their_own_bytes_back(tmp_path: Path) -> None:
    pieces = [bytes([number]) * (1000 + 37 * number) for number in range(64)]
    with open_spool(str(tmp_path / "out")) as spool, ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda piece: spool.add(memoryview(piece)), pieces))
        assert list(tmp_path.iterdir()) == []
        found = list(pool.map(lambda at: bytes(spool.read(places[at], len(pieces[at]))), range(64)))
    assert found == pieces
    assert list(tmp_path.iterdir()) == []


def test_a_part_can_be_read(tmp_path: Path) -> None:
    with open_spool(str(tmp_path / "out")) as spool:
        spool.add(memoryview(b"before"))
        at = spool.add(memoryview(b"0123456789"))
        assert spool.read(at + 3, 4) == b"3456"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(StorageError, match="permission denied"), open_spool(str(tmp_path / "out")):
        pass
