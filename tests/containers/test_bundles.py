"""open_bundle and save_bundle: files by name, lazily, and written so that others read them."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from containers.torch_files import raw_bytes
from safetensors.torch import load_file, save_file

from loraformat.containers import bundles, combine_crc32, open_bundle, plan_file, save_bundle
from loraformat.containers.rows import read_rows, read_rows_into
from loraformat.errors import ContainerError, InvalidJson, StorageError, TruncatedFile
from loraformat.model.bundle import Bundle, File, JsonFile, RawFile, TensorFile, Tensors
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.storage import MemoryStore, open_store

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "s": torch.tensor(3)}


def bundle_of(*files: File) -> Bundle:
    return Bundle("", {file.name: file for file in files})


def tensor_file(name: str, container: str, tensors: dict[str, LazyTensor], **more: object) -> TensorFile:
    return TensorFile(name, 0, lambda: Tensors(container, tensors, **more))  # type: ignore[arg-type]


def lazies(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(value) for name, value in tensors.items()}


def test_files_are_told_apart_by_name(tmp_path: Path) -> None:
    for name in ("a.json", "A.SafeTensors", "b.pt", "c.bin", "d.pth", "e.ckpt", "README.md", ".hidden"):
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "folder").mkdir()
    kinds = {name: type(file) for name, file in open_bundle(str(tmp_path)).files.items()}
    assert kinds == {
        ".hidden": RawFile,
        "A.SafeTensors": TensorFile,
        "README.md": RawFile,
        "a.json": JsonFile,
        "b.pt": TensorFile,
        "c.bin": TensorFile,
        "d.pth": TensorFile,
        "e.ckpt": TensorFile,
    }


def test_damaged_files_do_no_harm_until_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    found = open_bundle(str(tmp_path))
    assert not found.is_single_file
    with pytest.raises(InvalidJson):
        found.json("adapter_config.json")
    with pytest.raises(TruncatedFile):
        found.tensors("adapter_model.safetensors")


def test_the_container_is_chosen_by_magic(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "really.pt")
    torch.save(TENSORS, tmp_path / "model.bin")
    torch.save(TENSORS, tmp_path / "lie.safetensors")
    found = open_bundle(str(tmp_path))
    assert found.tensors("really.pt").container == "safetensors"
    assert found.tensors("model.bin").container == "torch"
    with pytest.raises(ContainerError, match="a zip archive"):
        found.tensors("lie.safetensors")


def test_one_file_is_a_bundle_whatever_its_name(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "weights")
    (tmp_path / "other.json").write_bytes(b"{}")
    found = open_bundle(str(tmp_path / "weights"))
    assert found.is_single_file
    assert list(found.files) == ["weights"]
    assert list(found.tensors("weights").entries) == list(TENSORS)


def test_a_header_is_read_once(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    file = open_bundle(str(tmp_path)).tensor_files()[0]
    assert file.open() is file.open()


def test_json_limits_depend_on_the_name(tmp_path: Path) -> None:
    text = b'["' + b"x" * (1 << 20) + b'"]'
    for name in ("adapter_config.json", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(text)
    found = open_bundle(str(tmp_path))
    assert found.json("tokenizer.json") == found.json("model.safetensors.index.json") == ["x" * (1 << 20)]
    with pytest.raises(InvalidJson, match="at most 1048576 are read"):
        found.json("adapter_config.json")


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(StorageError):
        open_bundle("absent")


def test_a_bundle_is_written_for_others_to_read(tmp_path: Path) -> None:
    files = bundle_of(
        RawFile("README.md", 2, lambda: b"hi"),
        JsonFile("config.json", 2, lambda: b"{}", dict),
        tensor_file("x.safetensors", "safetensors", lazies(TENSORS), metadata={"format": "pt"}),
        tensor_file("x.pt", "torch", lazies(TENSORS), wrapper=("model",), extras={"config": {"rank": 8}, "model.n": 1}),
    )
    seen: list[tuple[int, int]] = []
    names = save_bundle(files, open_store(str(tmp_path)), lambda done, total: seen.append((done, total)))
    assert names == ("README.md", "config.json", "x.pt", "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names)
    assert (tmp_path / "README.md").read_bytes() == b"hi"
    assert seen[-1] == (sum(path.stat().st_size for path in tmp_path.iterdir()),) * 2
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert saved["config"] == {"rank": 8}
    assert saved["model"].pop("n") == 1
    for found in (load_file(tmp_path / "x.safetensors"), saved["model"]):
        assert set(found) == set(TENSORS)
        assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    again = open_bundle(str(tmp_path))
    assert again.tensors("x.pt").extras == {"config": {"rank": 8}, "model.n": 1}
    assert again.tensors("x.safetensors").metadata == {"format": "pt"}


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_large_tensors_are_written_in_blocks(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.arange(1000, dtype=np.float32).reshape(100, 10)
    asked: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return value[start:stop]

    lazy = {"w": LazyTensor((100, 10), DType.F32, read), "t": LazyTensor.of(np.ascontiguousarray(value.T)).T}
    stores = []
    for block in (1 << 20, 640, 1):
        monkeypatch.setattr(bundles, "_BLOCK_NBYTES", block)
        asked.clear()
        stores.append(MemoryStore())
        save_bundle(bundle_of(tensor_file("m.pt", container, lazy)), stores[-1])
        assert max(asked) * 40 <= max(block, 40)
    assert stores[0].read("m.pt") == stores[1].read("m.pt") == stores[2].read("m.pt")


def test_a_lazy_that_lies_is_caught() -> None:
    lazy = {"w": LazyTensor((3,), DType.F32, lambda start, stop: np.ones(2, np.float32))}
    with pytest.raises(AssertionError, match=r"expected shape \(3,\), loaded \(2,\)"):
        save_bundle(bundle_of(tensor_file("m.safetensors", "safetensors", lazy)), MemoryStore())


def test_windows_in_any_order_make_the_same_torch_file() -> None:
    value = torch.arange(40.0).reshape(10, 4)
    layout = plan_file("torch", {"w": (DType.F32, (10, 4))}, aliases={"tied": "w"})
    span = layout.entries["w"].span
    assert layout.entries["tied"] == layout.entries["w"]
    windows = [value[start : start + 3] for start in range(0, 10, 3)]
    checksums = [(zlib.crc32(raw_bytes(window)), window.nbytes) for window in windows]
    total = 0
    for checksum, nbytes in checksums:
        total = combine_crc32(total, checksum, nbytes)
    store = MemoryStore()
    with store.create("m.pt", layout.nbytes) as writer:
        for number in (2, 0, 3, 1):
            writer.write_at(span.offset + 48 * number, raw_bytes(windows[number]))
        for offset, part in layout.frame({"w": total}):
            writer.write_at(offset, part)
    assert torch.equal(bundles.open_tensors(store, "m.pt").entries["tied"].torch(), value)


def test_rows_of_contiguous_strided_and_scalar_tensors() -> None:
    data = MemoryStore({"m": np.arange(12, dtype="<f4").tobytes()})
    plain = StoredTensor("m", DType.F32, (3, 4), Span(0, 48))
    transposed = StoredTensor("m", DType.F32, (4, 3), Span(0, 48), strides=(1, 4), storage="0")
    scalar = StoredTensor("m", DType.F32, (), Span(20, 4))
    full = np.arange(12, dtype="<f4").reshape(3, 4)
    assert np.array_equal(read_rows(data, plain, 1, 3), full[1:3])
    assert np.array_equal(read_rows(data, plain, 2, 2), full[2:2])
    assert np.array_equal(read_rows(data, transposed, 1, 3), full.T[1:3])
    assert np.array_equal(read_rows(data, transposed, 4, 4), full.T[4:4])
    assert np.array_equal(read_rows(data, scalar, 0, 1), np.float32(5))
    buffer = bytearray(16)
    read_rows_into(data, plain, 2, 3, memoryview(buffer))
    assert buffer == full[2:3].tobytes()
    read_rows(data, plain, 0, 3)[:] += 1
    assert np.array_equal(read_rows(data, plain, 0, 3), full)


def test_opening_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "m.pt")
    script = (
        "import sys; from loraformat.containers import open_bundle, open_checkpoint\n"
        f"b = open_bundle({str(tmp_path)!r}); b.tensors('m.pt'); b.tensors('model.safetensors')\n"
        f"open_checkpoint({str(tmp_path)!r})\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub', 'pickle'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
