"""Torch files for tests: saved by torch, or written through our layout; and read back by us."""

import io
import zipfile
import zlib

import torch

from loraformat.containers import open_tensors
from loraformat.containers.torch_file import layout as torch_layout
from loraformat.model.bundle import Tensors
from loraformat.model.tensors import DType
from loraformat.storage import MemoryStore

NAME = "model.pt"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def raw_bytes(value: torch.Tensor) -> bytes:
    """The elements as they stand in a file, by torch."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def opened(data: bytes) -> Tensors:
    return open_tensors(MemoryStore({NAME: data}), NAME)


def loaded(data: bytes) -> dict[str, torch.Tensor]:
    return {name: lazy.torch() for name, lazy in opened(data).entries.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert raw_bytes(found[name]) == raw_bytes(value)


def random_tensor(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is DType.BOOL:
        return torch.randint(0, 2, shape).bool()
    count = int(torch.Size(shape).numel())
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype.torch).reshape(shape)


def dtype_of(value: torch.Tensor) -> DType:
    found = DType.by_torch_name(str(value.dtype).removeprefix("torch."))
    assert found is not None
    return found


def written(
    tensors: dict[str, torch.Tensor], wrapper: tuple[str, ...] = (), aliases: dict[str, str] | None = None
) -> bytes:
    shapes = {name: (dtype_of(value), tuple(value.shape)) for name, value in tensors.items()}
    layout = torch_layout.plan_file(shapes, wrapper=wrapper, aliases=aliases)
    data = bytearray(b"\xee" * layout.nbytes)
    for name, value in tensors.items():
        span = layout.entries[name].span
        data[span.offset : span.end] = raw_bytes(value)
    for offset, part in layout.frame({name: zlib.crc32(raw_bytes(value)) for name, value in tensors.items()}):
        data[offset : offset + len(part)] = part
    assert len(data) == layout.nbytes
    return bytes(data)


GOOD = saved({"a": torch.arange(4.0), "b": torch.ones(2, 3).T, "c": torch.zeros(0)})
TOP = zipfile.ZipFile(io.BytesIO(GOOD)).namelist()[0].split("/")[0]
