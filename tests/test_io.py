"""load_adapter and save_adapter: the library's way in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraformat
from loraformat import Adapter, AdapterConfig, Assumptions, Hadamard, LazyTensor, LowRank
from loraformat.errors import AdapterRefused, AssumptionContradicted, NonFiniteValue, StorageError, UsageError

Q = "model.layers.0.self_attn.q_proj.weight"


def adapter(up: torch.Tensor, down: torch.Tensor, scale: float | None = 2.0) -> Adapter:
    update = LowRank(LazyTensor.of(up), LazyTensor.of(down), scale)
    return Adapter(config=AdapterConfig(base_model="example/base"), updates={Q: (update,)})


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    for to in ("peft", "native"):
        loraformat.save_adapter(adapter(up, down), str(tmp_path / to), to=to)
        back = loraformat.load_adapter(str(tmp_path / to))
        (update,) = back.updates[Q]
        assert isinstance(update, LowRank)
        assert (update.scale, back.config.base_model) == (2.0, "example/base")
        assert torch.equal(update.up.torch(), up)
        assert torch.equal(update.down.torch(), down)


@pytest.mark.parametrize("is_open", [False, True])
def test_the_shapes_of_the_base_tell_what_the_files_leave_open(tmp_path: Path, is_open: bool) -> None:
    """The kernel of a convolution is nowhere in a file of hand-written names."""
    tensors = {"conv.lora_A": torch.randn(2, 27), "conv.lora_B": torch.randn(8, 2)}
    torch.save(tensors, tmp_path / "mine.pt")
    (tmp_path / "base").mkdir()
    save_file({"conv.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "base" / "model.safetensors")
    known = Assumptions(scale=3.0)
    base = loraformat.open_checkpoint(tmp_path / "base") if is_open else tmp_path / "base"
    loaded = loraformat.load_adapter(tmp_path / "mine.pt", base=base, assumptions=known, format="dump")
    wanted = 3 * torch.einsum("or,ri->oi", tensors["conv.lora_B"].double(), tensors["conv.lora_A"].double())
    found = loaded.delta("conv.weight", dtype="float64")
    np.testing.assert_allclose(found, wanted.reshape(8, 3, 3, 3).numpy(), rtol=1e-12)
    alone = loraformat.load_adapter(tmp_path / "mine.pt", assumptions=known, format="dump")
    assert alone.delta("conv.weight").shape == (8, 27)


def test_alpha_and_assumptions_may_not_contradict_each_other(tmp_path: Path) -> None:
    loraformat.save_adapter(adapter(torch.ones(6, 2), torch.ones(2, 4)), tmp_path / "a", to="peft")
    with pytest.raises(UsageError, match="alpha"):
        loraformat.load_adapter(tmp_path / "a", alpha=4, assumptions=Assumptions(alpha=5))


def test_loading_reads_no_value(tmp_path: Path) -> None:
    loraformat.save_adapter(adapter(torch.zeros(6, 2), torch.zeros(2, 4)), str(tmp_path / "a"), to="peft")
    path = tmp_path / "a" / "adapter_model.safetensors"
    loaded = loraformat.load_adapter(str(tmp_path / "a"))
    values = load_file(path)
    assert loaded.updates[Q][0].up.shape == (6, 2)
    path.write_bytes(path.read_bytes()[:-8])
    assert len(values) == 2
    with pytest.raises(StorageError):
        loaded.updates[Q][0].up.torch()


def test_alpha_fills_a_gap_and_contradicts_nothing(tmp_path: Path) -> None:
    loraformat.save_adapter(adapter(torch.ones(6, 2), torch.ones(2, 4)), str(tmp_path / "a"), to="peft")
    assert loraformat.load_adapter(str(tmp_path / "a"), alpha=4).updates[Q][0].scale == 2.0
    with pytest.raises(AssumptionContradicted, match="alpha"):
        loraformat.load_adapter(str(tmp_path / "a"), alpha=5)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    up = torch.zeros(6, 2)
    up[3, 1] = value
    with pytest.raises(NonFiniteValue, match="NaN or infinity"):
        loraformat.save_adapter(adapter(up, torch.ones(2, 4)), str(tmp_path / "a"), to="peft")
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_a_format_cannot_express_is_refused(tmp_path: Path) -> None:
    factors = [LazyTensor.of(torch.ones(4, 2)), LazyTensor.of(torch.ones(2, 4))] * 2
    loha = Adapter(config=AdapterConfig(), updates={Q: (Hadamard(*factors, 1.0),)})
    with pytest.raises(AdapterRefused) as caught:
        loraformat.save_adapter(loha, str(tmp_path / "a"), to="native")
    assert [loss.code for loss in caught.value.findings] == ["LF702"]
    assert list(tmp_path.iterdir()) == []


def test_the_public_names_are_what_they_say() -> None:
    assert all(getattr(loraformat, name) is not None for name in loraformat.__all__)
    assert sorted(dir(loraformat)) == sorted(loraformat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loraformat.nothing
