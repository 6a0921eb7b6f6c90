"""The members of a tar archive against the standard library, and archives that are refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from loraformat.containers import open_bundle
from loraformat.errors import InvalidHeader, StorageError, TruncatedFile
from loraformat.storage import MemoryStore, TarStore

CONTENTS = {"model_config.yaml": b"a: 1\n", "model_weights.ckpt": bytes(range(256)) * 9, "empty": b""}


def archive(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def opened(data: bytes) -> TarStore:
    return TarStore(MemoryStore({"a.nemo": data}), "a.nemo")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_members_are_read_where_they_lie(form: int, prefix: str) -> None:
    store = opened(archive({prefix + name: data for name, data in CONTENTS.items()}, form))
    assert store.files() == {name: len(data) for name, data in sorted(CONTENTS.items())}
    for name, data in CONTENTS.items():
        assert store.read(name) == data
        buffer = bytearray(len(data[3:50]))
        store.read_into(name, min(3, len(data)), buffer)
        assert buffer == data[3:50]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_those_of_the_extended_header(form: int) -> None:
    name = "w" * 150 + "é.ckpt"
    assert opened(archive({name: b"12"}, form)).read(name) == b"12"


def test_folders_of_the_archive_are_named_and_not_entered() -> None:
    store = opened(archive({"mp_rank_00/model_weights.ckpt": b"1", "model_config.yaml": b"{}"}))
    assert store.folders() == ("mp_rank_00",)
    assert list(store.files()) == ["model_config.yaml"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b"])
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(InvalidHeader, match="leads out"):
        opened(archive({name: b"1"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(InvalidHeader, match="only files are expected"):
        opened(archive({"model_weights.ckpt": b""}, type=kind, linkname="/etc/passwd"))


def test_a_second_member_of_the_same_name_is_refused() -> None:
    one = archive({"x": b"1"})[:1024]
    with pytest.raises(InvalidHeader, match="twice"):
        opened(one + archive({"./x": b"2"}))


def test_a_compressed_archive_says_what_to_do() -> None:
    import gzip

    with pytest.raises(InvalidHeader, match="compressed"):
        opened(gzip.compress(archive(CONTENTS)).ljust(512, b"\0"))


@pytest.mark.parametrize("data", [b"", b"x" * 40, b"x" * 4096])
def test_what_is_not_a_tar_archive_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidHeader, match="not a tar archive"):
        opened(data)


def test_a_cut_archive_is_refused() -> None:
    data = archive(CONTENTS)
    with pytest.raises(TruncatedFile):
        opened(data[: 512 + 512 + 512 + 1000])


def test_a_damaged_header_is_refused() -> None:
    data = bytearray(archive(CONTENTS, tarfile.USTAR_FORMAT))
    data[1024] ^= 1
    with pytest.raises(InvalidHeader, match="at byte 1024 is damaged"):
        opened(bytes(data))


def test_a_size_beyond_any_file_is_refused_without_being_read() -> None:
    data = bytearray(archive({"x": b"1"}, tarfile.USTAR_FORMAT))
    data[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % sum(data[:148] + b" " * 8 + data[156:512])
    with pytest.raises(TruncatedFile):
        opened(bytes(data))


def test_what_is_not_a_member_is_not_found() -> None:
    with pytest.raises(StorageError, match="no such file"):
        opened(archive(CONTENTS)).read("other")


def test_a_nemo_file_opens_as_the_folder_of_its_members(tmp_path: Path) -> None:
    path = tmp_path / "a.nemo"
    path.write_bytes(archive(CONTENTS))
    bundle = open_bundle(str(path))
    assert set(bundle.files) == set(CONTENTS)
    assert not bundle.is_single_file
