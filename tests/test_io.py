"""load_adapter and save_adapter: the library's way in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraformat
from loraformat import Adapter, AdapterConfig, Hadamard, LazyTensor, LowRank
from loraformat.errors import AdapterRefused, AssumptionContradicted, NonFiniteValue, StorageError

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
