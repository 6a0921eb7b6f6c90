"""Arrays of numpy.savez, with numpy itself as second opinion, and what is refused."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest

from loraformat.containers import npz
from loraformat.errors import ContainerError, InvalidHeader, LoraFormatError, NotATensorFile, TruncatedFile
from loraformat.storage import MemoryStore


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def read(data: bytes) -> dict[str, Any]:
    return npz.read_arrays(MemoryStore({"adapters.npz": data}), "adapters.npz")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (0, 4)])
def test_what_numpy_saves_is_read(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    (name, lazy), *others = read(saved(**{"a.b": array})).items()
    assert (name, others, lazy.shape) == ("a.b", [], shape)
    assert np.array_equal(lazy.torch().numpy(), array)


def test_columns_first_is_read_as_it_means() -> None:
    array = np.asfortranarray(np.arange(12, dtype="float32").reshape(3, 4))
    lazy = read(saved(x=array))["x"]
    assert np.array_equal(lazy.torch().numpy(), array)
    assert np.array_equal(lazy.read(1, 3), array[1:3])


def test_a_changed_value_is_found() -> None:
    data = bytearray(saved(x=np.ones(8, dtype="float32")))
    data[data.index(b"\x00\x00\x80?") + 2] ^= 1
    with pytest.raises(ContainerError, match="CRC-32"):
        read(bytes(data))["x"].torch()


def zipped(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", NotATensorFile),
        (b"not a zip", NotATensorFile),
        (zipped("x.txt", b"hello"), NotATensorFile),
        (zipped("../x.npy", b""), InvalidHeader),
        (zipped("x.npy", b"hello"), InvalidHeader),
        (zipped("x.npy", npy(b"{'descr': __import__('os')}")), InvalidHeader),
        (zipped("x.npy", npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")), InvalidHeader),
        (zipped("x.npy", npy(b"{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", b"1234")), ContainerError),
        (zipped("x.npy", npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }", b"1234")), ContainerError),
        (zipped("x.npy", saved(x=np.ones(3)), zipfile.ZIP_DEFLATED), InvalidHeader),
        (saved(x=np.ones(3))[:-9], TruncatedFile),
    ],
)
def test_anything_else_is_refused(data: bytes, error: type[LoraFormatError]) -> None:
    with pytest.raises(error):
        read(data)
