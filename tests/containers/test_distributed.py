"""Checkpoints of torch.distributed: what its own writer writes is read, and what it would not write is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_files import Sharded, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from loraformat.containers import open_bundle
from loraformat.errors import ContainerError, InvalidHeader, TruncatedFile, UnsafePickle
from loraformat.model.bundle import Tensors

NAME = "decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight"


def opened(folder: Path) -> Tensors:
    return open_bundle(str(folder)).tensors(".metadata")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("cuts", [((), ()), ((2,), (3, 4)), ((1, 2, 5), ()), ((), (1,))])
@pytest.mark.parametrize("files", [1, 3])
def test_a_tensor_comes_back_whatever_its_shards(tmp_path: Path, dtype: Any, cuts: Any, files: int) -> None:
    torch.manual_seed(1)
    value = (10 * torch.randn(7, 5)).to(dtype)
    scalar = torch.tensor(3).to(dtype)
    save(tmp_path, {NAME: Sharded(value, cuts), "scalar": scalar, "empty": torch.zeros(0, 4)}, files=files)
    found = opened(tmp_path).entries
    assert torch.equal(found[NAME].torch(), value)
    assert torch.equal(found["scalar"].torch(), scalar)
    assert found["empty"].load().shape == (0, 4)
    for start, stop in ((0, 3), (2, 6), (6, 7), (4, 4)):
        rows = torch.from_numpy(found[NAME].read(start, stop).copy())
        assert torch.equal(rows.to(dtype), value[start:stop])


def test_what_is_no_tensor_and_what_nothing_names_are_listed(tmp_path: Path) -> None:
    save(tmp_path, {NAME: torch.ones(2, 2), "iteration": 7, "nested": {"a": [1, 2], "b": torch.zeros(3)}})
    (tmp_path / "__9_0.distcp").write_bytes(b"PK")
    found = opened(tmp_path)
    assert sorted(found.entries) == sorted([NAME, "nested.b"])
    assert {"iteration", "__9_0.distcp"} <= found.extras.keys()
    assert "__0_0.distcp" not in found.extras


def test_the_plans_that_some_writers_leave_in_the_metadata_are_passed_over(tmp_path: Path) -> None:
    """Megatron-Core puts the plans of all ranks there. Source: its strategies/state_dict_saver.py."""
    from torch.distributed.checkpoint.filesystem import _StoragePrefix
    from torch.distributed.checkpoint.planner import SavePlan

    save(tmp_path, {NAME: torch.ones(2, 2)})
    items = Sharded(torch.ones(2, 2), ((), ())).__create_write_items__(NAME, None)
    change(
        tmp_path, lambda it: setattr(it, "all_local_plans", [SavePlan(items, _StoragePrefix("__0_"), {NAME: (NAME,)})])
    )
    assert torch.equal(opened(tmp_path).entries[NAME].torch(), torch.ones(2, 2))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_of_every_python_are_read(tmp_path: Path, protocol: int) -> None:
    save(tmp_path, {NAME: Sharded(torch.arange(6.0).reshape(2, 3), ((1,), ()))})
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    assert torch.equal(opened(tmp_path).entries[NAME].torch(), torch.arange(6.0).reshape(2, 3))


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    """The metadata with one thing changed, pickled again by Python."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def chunks(metadata: Any) -> list[Any]:
    return metadata.state_dict_metadata[NAME].chunks


def info(metadata: Any, number: int = 0) -> Any:
    return list(metadata.storage_data.values())[number]


def shifted(chunk: Any, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))


def nested(levels: int = 400) -> list[Any]:
    """Lists in lists, as deep as pickle.dumps writes them."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


class Evil:
    """Runs when unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit(99)",))


class Thing:
    """A class that no checkpoint has."""


HOSTILE: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "code": (lambda it: setattr(it, "planner_data", Evil()), UnsafePickle, "not executed"),
    "class": (lambda it: setattr(it, "planner_data", Thing()), UnsafePickle, "not executed"),
    "above": (
        lambda it: setattr(info(it), "relative_path", "../x.distcp"),
        InvalidHeader,
        "the folder does not contain",
    ),
    "absolute": (
        lambda it: setattr(info(it), "relative_path", "/etc/passwd"),
        InvalidHeader,
        "the folder does not contain",
    ),
    "backslash": (lambda it: setattr(info(it), "relative_path", "..\\x"), InvalidHeader, "the folder does not contain"),
    "missing": (lambda it: setattr(info(it), "relative_path", "__1_0.distcp"), ContainerError, "missing"),
    "beyond": (lambda it: setattr(info(it), "length", 1 << 40), TruncatedFile, "ends at byte"),
    "negative": (lambda it: setattr(info(it), "offset", -1), InvalidHeader, "at byte -1"),
    "nested": (lambda it: setattr(info(it), "relative_path", nested()), InvalidHeader, "in a list"),
    "text": (lambda it: setattr(info(it), "offset", "0"), InvalidHeader, "at byte 0"),
    "shared": (lambda it: setattr(info(it, 1), "offset", info(it).offset), InvalidHeader, "share bytes"),
    "compressed": (
        lambda it: setattr(info(it), "transform_descriptors", ["stream.zstd"]),
        ContainerError,
        "compressed or encrypted",
    ),
    "hole": (lambda it: chunks(it).pop(), InvalidHeader, "overlap, leave gaps"),
    "no shards": (lambda it: chunks(it).clear(), InvalidHeader, "no shards"),
    "twice": (lambda it: chunks(it).append(chunks(it)[0]), InvalidHeader, "two shards at the same offsets"),
    "overlap": (lambda it: setattr(chunks(it)[0], "sizes", torch.Size((4, 4))), InvalidHeader, "overlap"),
    "axes": (lambda it: setattr(chunks(it)[0], "sizes", torch.Size((2,))), InvalidHeader, "number of axes"),
    "huge": (
        lambda it: setattr(it.state_dict_metadata[NAME], "size", torch.Size((1 << 40, 1 << 40))),
        InvalidHeader,
        "too large",
    ),
    "unsaid": (lambda it: it.storage_data.clear(), InvalidHeader, "the location of a shard is missing"),
    "dtype": (
        lambda it: setattr(it.state_dict_metadata[NAME].properties, "dtype", "float32"),
        ContainerError,
        "unsupported dtype",
    ),
    "other dtype": (
        lambda it: setattr(it.state_dict_metadata[NAME].properties, "dtype", torch.complex128),
        UnsafePickle,
        "names torch.complex128",
    ),
    "shape": (lambda it: setattr(it, "state_dict_metadata", {NAME: 3}), InvalidHeader, "expected a TensorStorage"),
    "list": (lambda it: setattr(it, "storage_data", []), InvalidHeader, "expected a dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, case: str) -> None:
    edit, error, message = HOSTILE[case]
    save(tmp_path, {NAME: Sharded(torch.arange(16.0).reshape(4, 4), ((2,), ()))})
    change(tmp_path, edit)
    with pytest.raises(error, match=message):
        opened(tmp_path)


def test_an_item_that_is_not_what_the_metadata_says_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {NAME: torch.arange(16.0).reshape(4, 4)})
    change(tmp_path, lambda it: setattr(it.state_dict_metadata[NAME].properties, "dtype", torch.bfloat16))
    with pytest.raises(ContainerError, match=r"says BF16 \[4, 4\], the item is F32"):
        opened(tmp_path).entries[NAME].load()


def test_a_damaged_item_is_found_when_it_is_read(tmp_path: Path) -> None:
    value = torch.arange(4096.0)
    save(tmp_path, {NAME: value})
    path = tmp_path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    at = content.find(value.numpy().tobytes()[64:128])
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ContainerError, match="CRC"):
        opened(tmp_path).entries[NAME].load()


def test_nesting_without_end_is_no_recursion(tmp_path: Path) -> None:
    """Written by hand, deeper than Python's own pickle could be read."""
    save(tmp_path, {NAME: torch.ones(2, 2)})
    path = tmp_path / ".metadata"
    deep = b"]" * 200_000 + b"a" * 199_999
    mark = b"\x8c\x0d__0_0.distcp\x94"
    content = path.read_bytes()
    at = content.index(b"\x8c\x0c__0_0.distcp\x94")
    path.write_bytes(content[:2] + content[11:at] + deep + b"\x94" + content[at + len(mark) :])
    with pytest.raises(InvalidHeader, match="in a list"):
        opened(tmp_path)


def test_every_cut_of_the_metadata_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {NAME: torch.ones(2, 2)})
    path = tmp_path / ".metadata"
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(UnsafePickle):
            opened(tmp_path)
