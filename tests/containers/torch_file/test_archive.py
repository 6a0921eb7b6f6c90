"""The reader and writer of torch files, with torch as the second opinion."""

import io
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from containers.torch_files import GOOD, NAME, assert_same, loaded, opened, random_tensor, raw_bytes, saved, written
from hypothesis import given
from hypothesis import strategies as st

from loraformat.containers import open_tensors
from loraformat.containers.torch_file import layout as torch_layout
from loraformat.containers.torch_zip import check_records, read_archive
from loraformat.errors import ContainerError, UnsafePickle
from loraformat.model.tensors import DType
from loraformat.storage import MemoryStore

DTYPES = sorted(DType, key=lambda dtype: dtype.safetensors)
SPECS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


@given(SPECS)
def test_we_read_what_torch_writes(specs: dict[str, tuple[DType, tuple[int, ...]]]) -> None:
    tensors = {name: random_tensor(*spec) for name, spec in specs.items()}
    assert_same(loaded(saved(tensors)), tensors)


@given(SPECS, st.sampled_from([(), ("model_state_dict",), ("checkpoint", "model")]))
def test_torch_reads_what_we_write(specs: dict[str, tuple[DType, tuple[int, ...]]], wrapper: tuple[str, ...]) -> None:
    tensors = {name: random_tensor(*spec) for name, spec in specs.items()}
    data = written(tensors, wrapper)
    found = torch.load(io.BytesIO(data), weights_only=True)
    for key in wrapper:
        assert list(found) == [key]
        found = found[key]
    assert_same(found, tensors)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
    if tensors:
        assert_same(loaded(data), tensors)
        assert opened(data).wrapper == wrapper


def test_an_alias_shares_its_storage() -> None:
    table = torch.arange(6.0).reshape(2, 3)
    data = written({"wte": table, "b": torch.ones(1)}, aliases={"lm_head": "wte"})
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert found["lm_head"].data_ptr() == found["wte"].data_ptr()
    store = MemoryStore({NAME: data})
    places = read_archive(store, NAME).tensors
    assert places["lm_head"] == places["wte"]
    assert places["lm_head"].storage != places["b"].storage


def test_tied_weights_of_torch_are_one_storage() -> None:
    table = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    places = read_archive(MemoryStore({NAME: saved({"wte": table, "lm_head": table})}), NAME).tensors
    assert places["lm_head"] == places["wte"]


def test_parts_of_one_storage_are_different_tensors() -> None:
    flat = torch.arange(12.0)
    parts = {"a": flat[:4], "b": flat[4:8], "t": flat.reshape(3, 4).T, "all": flat}
    places = read_archive(MemoryStore({NAME: saved(parts)}), NAME).tensors
    assert places["a"].storage != places["b"].storage
    assert places["a"].strides is None
    assert places["t"].strides == (1, 4)
    assert_same(loaded(saved(parts)), parts)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda x: x.permute(2, 0, 1),
    "steps": lambda x: x[::2, 1:, ::3],
    "one row": lambda x: x[2],
    "one column": lambda x: x[:, 1, 1],
    "one element": lambda x: x[1, 2, 3],
    "empty": lambda x: x[:, 2:2],
    "overlap": lambda x: x.reshape(-1).unfold(0, 5, 5),
    "inner axis of length 1": lambda x: x[:, 1:2, :],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_strided_views_are_gathered(view: str, dtype: torch.dtype) -> None:
    value = VIEWS[view](torch.arange(60).reshape(4, 3, 5).to(dtype))
    data = saved({"v": value})
    assert_same(loaded(data), {"v": value})
    lazy = opened(data).entries["v"]
    if value.ndim:
        for start in range(len(value)):
            assert lazy.read(start, start + 1).tolist() == value[start : start + 1].tolist()


def test_parameters_and_ordered_dicts_are_read() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    assert_same(loaded(saved(state)), dict(state))
    parameters = dict(module.named_parameters())
    assert_same(loaded(saved(parameters)), {name: value.detach() for name, value in parameters.items()})


def test_a_wrapped_checkpoint_keeps_what_stands_beside() -> None:
    w = torch.ones(2, 2)
    config = {"rank": 8, "targets": ["q", "v"], "lr": 1e-4, "ok": True, "none": None, "shape": (1, 2)}
    found = opened(saved({"config": config, "model_state_dict": {"w": w, "step": 3}, "epoch": 7}))
    assert found.wrapper == ("model_state_dict",)
    assert list(found.entries) == ["w"]
    assert found.extras == {"config": {**config, "shape": [1, 2]}, "epoch": 7, "model_state_dict.step": 3}


def test_a_training_checkpoint_is_read_by_its_model() -> None:
    """The layout of nanoGPT: an optimizer's state and a loss beside the model."""
    w = torch.ones(2, 2)
    found = opened(
        saved(
            {
                "model": {"w": w, "b": torch.zeros(2)},
                "optimizer": {"state": {0: {"exp_avg": w}}, "param_groups": [{"params": [0]}]},
                "best_val_loss": torch.tensor(1.5),
            }
        )
    )
    assert (found.wrapper, list(found.entries)) == (("model",), ["w", "b"])
    assert found.extras["best_val_loss"] == "tensor F32 []"
    assert found.extras["optimizer"] == {
        "state": {"0": {"exp_avg": "tensor F32 [2, 2]"}},
        "param_groups": [{"params": [0]}],
    }


def test_two_wrappers_are_unwrapped() -> None:
    found = opened(saved({"anything": {"state_dict": {"w": torch.ones(1)}, "x": 1}}))
    assert (found.wrapper, list(found.entries), found.extras) == (("anything", "state_dict"), ["w"], {"anything.x": 1})


def test_tensors_in_two_unknown_places_are_ambiguous() -> None:
    with pytest.raises(ContainerError, match='several dicts: "ema", "raw"'):
        opened(saved({"ema": {"w": torch.ones(1)}, "raw": {"w": torch.ones(1)}}))


def test_plain_values_among_tensors_are_extras() -> None:
    found = opened(saved({"w": torch.ones(1), "alpha": 16, "name": "x"}))
    assert (list(found.entries), found.wrapper, found.extras) == (["w"], (), {"alpha": 16, "name": "x"})


@pytest.mark.parametrize("value", [torch.ones(1), [torch.ones(1)], 3, {1: torch.ones(1)}])
def test_what_is_no_dict_of_names_and_tensors_is_refused(value: object) -> None:
    with pytest.raises(ContainerError):
        opened(saved(value))


class Opaque:
    """Something that only its own module can unpickle."""


@pytest.mark.parametrize(
    "value",
    [
        {"w": torch.ones(1), "x": Opaque()},
        {"w": torch.ones(1), "x": {1, 2}},
        {"w": torch.ones(2, 2).to_sparse()},
        {"w": torch.ones(2, device="meta")},
        {"w": torch.ones(2, dtype=torch.complex64).conj()},
        {"w": torch.ones(2, dtype=torch.complex128)},
    ],
)
def test_what_is_more_than_a_tensor_is_refused_by_name(value: object) -> None:
    with pytest.raises(UnsafePickle) as caught:
        opened(saved(value))
    assert "weights_only" not in str(caught.value)


def test_a_damaged_record_is_found_when_it_is_loaded() -> None:
    place = read_archive(MemoryStore({NAME: GOOD}), NAME).tensors["a"].span
    bad = GOOD[: place.offset] + b"\x01" + GOOD[place.offset + 1 :]
    found = opened(bad).entries
    assert torch.equal(found["b"].torch(), torch.ones(3, 2))
    with pytest.raises(ContainerError, match='record "data/0" is damaged: its CRC-32 is'):
        found["a"].torch()
    check_records(MemoryStore({NAME: GOOD}), NAME)
    with pytest.raises(ContainerError, match='record "data/0" is damaged'):
        check_records(MemoryStore({NAME: bad}), NAME)


def test_checksums_that_torch_did_not_compute_are_not_checked() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved({"a": torch.arange(4.0)})
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(loaded(data), {"a": torch.arange(4.0)})


def test_equal_arguments_give_equal_bytes() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.int8)}
    assert written(tensors) == written(dict(tensors))
    store = MemoryStore({NAME: written(tensors)})
    assert all(tensor.span.offset % 64 == 0 for tensor in read_archive(store, NAME).tensors.values())


def test_large_files_use_zip64() -> None:
    """Two tensors beyond 4 GiB: the frame alone, laid into a sparse file, is an archive for us, Python and torch."""
    layout = torch_layout.plan_file({"a": (DType.F32, (1 << 30, 1)), "b": (DType.U8, (5,)), "c": (DType.F16, ())})
    parts = layout.frame({"a": 0, "b": zlib.crc32(b"12345"), "c": 0})
    assert layout.entries["b"].span.offset > 1 << 32

    class Sparse(MemoryStore):
        def files(self) -> dict[str, int]:
            return {NAME: layout.nbytes}

        def size(self, path: str) -> int:
            return layout.nbytes

        def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
            assert nbytes is not None
            assert nbytes < 1 << 20
            data = bytearray(nbytes)
            self.read_into(path, offset, data)
            return bytes(data)

        def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
            for start, part in [*parts, (layout.entries["b"].span.offset, b"12345")]:
                low, high = max(start, offset), min(start + len(part), offset + len(buffer))
                if low < high:
                    buffer[low - offset : high - offset] = part[low - start : high - start]

    places = read_archive(Sparse(), NAME).tensors
    assert {name: place.span for name, place in places.items()} == {
        name: entry.span for name, entry in layout.entries.items()
    }
    assert raw_bytes(open_tensors(Sparse(), NAME).entries["b"].torch()) == b"12345"


def test_many_records_use_zip64() -> None:
    count = 65_536
    layout = torch_layout.plan_file({f"t{number}": (DType.U8, (0,)) for number in range(count)})
    data = bytearray(layout.nbytes)
    for offset, part in layout.frame(dict.fromkeys(layout.entries, 0)):
        data[offset : offset + len(part)] = part
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == count + 3
    assert len(opened(bytes(data)).entries) == count


def test_extras_that_collide_with_tensors_are_refused() -> None:
    with pytest.raises(ContainerError, match='"w" cannot be stored'):
        torch_layout.plan_file({"w": (DType.F32, ())}, extras={"w": 1})
