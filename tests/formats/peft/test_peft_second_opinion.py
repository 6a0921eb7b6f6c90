"""PEFT itself: adapters that it wrote are read to the deltas that it computes, and it loads what we write."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import open_folder, save
from oracle import dense
from torch import Tensor, nn

from loraformat.diagnostics import Severity
from loraformat.formats import native, peft
from loraformat.model.adapter import Adapter
from loraformat.model.updates import Dense, LowRank, Replace, Rows

RTOL = 1e-5  # float32 products of small rank


class Tiny(nn.Module):
    """A bit of everything that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 6), "k": nn.Linear(6, 4)}) for _ in range(2))
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 9, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = self.embed(numbers)
        for block in self.blocks:
            hidden = hidden + block["k"](block["q"](hidden))
        return self.head(self.norm(hidden)) + self.conv(torch.ones(1, 3, 2, 3)).sum()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def trained(**config: Any) -> Any:
    """A PeftModel whose adapter has random values throughout."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(), LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data = torch.randn_like(parameter) + (2 if "magnitude" in name else 0)
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q", "k"]},
    "rslora": {"target_modules": ["q"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"blocks.0.q": 3, r"blocks\.\d\.k": 1},
        "alpha_pattern": {"^blocks.1.q": 7, "k": 5},
    },
    "pattern-targets": {"target_modules": r"blocks\.1\.(q|k)"},
    "conv": {"target_modules": ["conv", "q"]},
    "embedding": {"target_modules": ["embed", "q"]},
    "dora": {"target_modules": ["q", "embed", "conv"], "use_dora": True},
    "modules-to-save": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "bias-all": {"target_modules": ["q"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["q", "k"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q", "k"], "lora_bias": True},
    "tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [5, 1, 7]}},
    "layers": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
}


def saved(case: str, folder: Path) -> tuple[Any, Adapter]:
    model = trained(**CASES[case])
    model.save_pretrained(folder)
    return model, peft.read(open_folder(folder))


def output(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(9))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_update_is_the_one_that_peft_applies(case: str, tmp_path: Path) -> None:
    model, adapter = saved(case, tmp_path)
    modules = dict(model.base_model.model.named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A")
    }
    found = {weight: each for weight, each in adapter.updates.items() if isinstance(each[-1], LowRank)}
    assert sorted(found) == sorted(f"{name}.weight" for name in layers)
    for name, layer in layers.items():
        update = found[f"{name}.weight"][-1]
        close(dense(update).reshape(layer.weight.shape), layer.get_delta_weight("default").detach())
    assert [note.code for note in adapter.notes] == []
    assert not adapter.unclaimed


@pytest.mark.parametrize("case", CASES)
def test_merging_by_the_updates_is_merging_by_peft(case: str, tmp_path: Path) -> None:
    model, adapter = saved(case, tmp_path)
    weights = {name: value.double() for name, value in base().state_dict().items()}
    for weight, updates in adapter.updates.items():
        for update in updates:
            weights[weight] = applied(weights[weight], update)
    for name, value in model.merge_and_unload().state_dict().items():
        close(weights[name], value)


def applied(weight: Tensor, update: Any) -> Tensor:
    match update:
        case Replace():
            return update.value.torch().double()
        case Rows():
            return weight.index_copy(0, torch.tensor(update.indices), update.values.torch().double())
        case Dense():
            return weight + dense(update)
        case LowRank(magnitude=None):
            return weight + dense(update).reshape(weight.shape)
    result = (weight + dense(update).reshape(weight.shape)).flatten(1)
    vector = update.magnitude.vector.torch().double()
    norm = result.norm(dim=update.magnitude.axis)
    factor = (vector / norm)[:, None] if update.magnitude.axis == 1 else (vector / norm)[None, :]
    return (result * factor).reshape(weight.shape)


@pytest.mark.parametrize("through_native", [False, True])
@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case: str, container: str, tmp_path: Path, *, through_native: bool) -> None:
    from peft import PeftModel

    from loraformat.formats.kit.base import WriteOptions

    model, adapter = saved(case, tmp_path / "source")
    if through_native:
        adapter = native.read(native.write(adapter))
    assert [found for found in peft.losses(adapter) if found.severity > Severity.INFO] == []
    save(peft.write(adapter, WriteOptions(container=container)), tmp_path / "written")
    again = PeftModel.from_pretrained(base(), tmp_path / "written")
    close(output(again), output(model))
    assert set(again.state_dict()) == set(model.state_dict())
