"""The archive around a torch file: a test for each rule, truncations and flipped bytes."""

import io
import struct
import zipfile
from collections.abc import Callable

import pytest
import torch
from containers.torch_files import GOOD, NAME, TOP, assert_same, loaded, opened, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat.errors import ContainerError, InvalidHeader, LoraFormatError, NotATensorFile, TruncatedFile


def rezipped(data: bytes, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_that_another_tool_wrote_is_read() -> None:
    assert_same(loaded(rezipped(GOOD, lambda records: None)), torch.load(io.BytesIO(GOOD), weights_only=True))


ZIP_FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], None], type[ContainerError], str]] = {
    "no pickle": (lambda r: r.pop(f"{TOP}/data.pkl") and None, NotATensorFile, "without data.pkl"),
    "no record": (lambda r: r.pop(f"{TOP}/data/0") and None, ContainerError, 'a: its record "data/0" is missing'),
    "short record": (lambda r: r.update({f"{TOP}/data/0": b"x"}), ContainerError, "4 elements, but .* has 1 bytes"),
    "long record": (lambda r: r.update({f"{TOP}/data/0": bytes(17)}), ContainerError, "has 17 bytes"),
    "big-endian": (lambda r: r.update({f"{TOP}/byteorder": b"big"}), ContainerError, "b'big'-endian file"),
    "version 99": (lambda r: r.update({f"{TOP}/version": b"99\n"}), ContainerError, "versions 1 to 10"),
    "version in words": (lambda r: r.update({f"{TOP}/version": b"new"}), ContainerError, "versions 1 to 10"),
    "TorchScript": (lambda r: r.update({f"{TOP}/constants.pkl": b""}), ContainerError, "TorchScript"),
    "code": (lambda r: r.update({f"{TOP}/code/x.py": b""}), ContainerError, "TorchScript"),
    "another folder": (lambda r: r.update({"other/x": b""}), InvalidHeader, "several folders"),
    "no folder": (lambda r: r.update({"x": b""}), InvalidHeader, '"x" is not a valid record name'),
    "traversal": (lambda r: r.update({f"{TOP}/../x": b""}), InvalidHeader, "is not a valid record name"),
    "absolute": (lambda r: r.update({"/etc/x": b""}), InvalidHeader, "is not a valid record name"),
    "backslash": (lambda r: r.update({f"{TOP}/..\\x": b""}), InvalidHeader, "is not a valid record name"),
}


@pytest.mark.parametrize("fault", ZIP_FAULTS)
def test_a_broken_archive_is_named(fault: str) -> None:
    change, kind, message = ZIP_FAULTS[fault]
    with pytest.raises(ContainerError, match=message) as caught:
        loaded(rezipped(GOOD, change))
    assert type(caught.value) is kind
    assert caught.value.where == NAME


def test_compressed_records_are_refused() -> None:
    with pytest.raises(InvalidHeader, match="is compressed or encrypted"):
        opened(rezipped(GOOD, lambda records: None, zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused() -> None:
    buffer = io.BytesIO(rezipped(GOOD, lambda records: None))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{TOP}/data.pkl", b"\x80\x02}.")
    with pytest.raises(InvalidHeader, match="twice"):
        opened(buffer.getvalue())


def test_a_comment_is_refused() -> None:
    buffer = io.BytesIO(rezipped(GOOD, lambda records: None))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"x"
    with pytest.raises(ContainerError):
        opened(buffer.getvalue())


OTHER_FILES = {
    "empty": (b"", "the file is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "page": (b"<html>\n<body>", "HTML"),
    "tar": (b"x" * 257 + b"ustar\0" + bytes(300), "a tar archive"),
    "gzip": (b"\x1f\x8b" + bytes(30), "a gzip stream"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + GOOD, "a 7z archive"),
    "junk before": (b"junk\xff" + GOOD, "neither a safetensors file nor"),
    "bare pickle": (b"\x80\x04N.", "a bare pickle; it was not executed"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_another_kind_of_file_is_named(name: str) -> None:
    data, message = OTHER_FILES[name]
    with pytest.raises(NotATensorFile, match=message):
        opened(data)


def test_the_old_format_of_torch_is_named() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(NotATensorFile, match=r"torch before 1\.6"):
        opened(buffer.getvalue())


def test_bytes_after_the_archive_are_refused() -> None:
    with pytest.raises(TruncatedFile, match=r"cut off, or something was appended"):
        opened(GOOD + b"x")


def test_every_truncation_is_an_error() -> None:
    for nbytes in range(len(GOOD)):
        with pytest.raises(ContainerError):
            opened(GOOD[:nbytes])


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.sampled_from([GOOD, written({"a": torch.arange(4.0)})]))
def test_a_flipped_byte_is_an_error_or_changes_nothing(position: int, change: int, good: bytes) -> None:
    position %= len(good)
    bad = good[:position] + bytes([good[position] ^ change]) + good[position + 1 :]
    try:
        found = loaded(bad)
    except LoraFormatError:
        return
    assert_same(found, loaded(good))


def test_overlapping_records_are_refused() -> None:
    """Fifield's bomb: two directory entries for the same bytes."""
    data = written({"a": torch.arange(4.0), "b": torch.arange(4.0)})
    first, second = (data.index(b"archive/data/" + digit) - 30 for digit in (b"0", b"1"))
    at = data.rindex(b"archive/data/1") - 46 + 42
    assert struct.unpack_from("<I", data, at) == (second,)
    with pytest.raises(InvalidHeader, match="overlaps the one before"):
        opened(data[:at] + struct.pack("<I", first) + data[at + 4 :])
