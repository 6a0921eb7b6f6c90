"""loralib itself: its files are read to the updates that it merges, and it computes the same with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib as lora
import pytest
import torch
from oracle import dense
from safetensors.torch import save_file
from torch import Tensor, nn

from loraformat.jobs.convert import convert
from loraformat.model.assumptions import Assumptions

RANK, ALPHA = 2, 3


class Net(nn.Module):
    """All kinds of layers that loralib has."""

    def __init__(self, enabled: list[bool]) -> None:
        super().__init__()
        fields: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA}
        self.wte = lora.Embedding(11, 6, **fields)
        self.q = lora.Linear(6, 8, **fields)
        self.c_attn = lora.MergedLinear(8, 12, enable_lora=enabled, **fields)
        self.conv = lora.Conv2d(2, 4, 3, **fields)

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.c_attn(self.q(self.wte(numbers))), self.conv(torch.ones(1, 2, 3, 3))


def trained(enabled: list[bool], seed: int = 1) -> Net:
    torch.manual_seed(0)
    net = Net(enabled)
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return net


def deltas(net: Net) -> dict[str, Tensor]:
    """What loralib itself adds to each weight, found by merging; its modules' own weights are the base's."""
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    after = net.state_dict()
    return {plain(name): (after[name] - before[name]).double() for name in before if name.endswith("weight")}


def plain(name: str) -> str:
    """What a model without loralib calls it: a convolution lies inside its wrapper."""
    return name.replace("conv.conv.", "conv.")


def base(net: Net, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    net.train()
    weights = {plain(name): value.contiguous() for name, value in net.state_dict().items() if "lora_" not in name}
    save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False]])
def test_its_files_become_the_updates_that_it_merges(tmp_path: Path, enabled: list[bool], *, wrapped: bool) -> None:
    from loraformat.io import hints_of, open_adapter
    from loraformat.jobs.inputs.subject import open_base

    net = trained(enabled)
    state = lora.lora_state_dict(net)
    torch.save({"model_state_dict": state} if wrapped else state, tmp_path / "model.26290.pt")
    said = Assumptions(alpha=ALPHA, enable_lora=tuple(enabled))
    known = hints_of(said, open_base(base(net, tmp_path / "base")))
    adapter = open_adapter(str(tmp_path / "model.26290.pt"), hints=known).adapter
    wanted = deltas(net)
    assert adapter.updates.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(dense(adapter.updates[name][0]), delta, rtol=1e-5, atol=1e-5)


def test_it_computes_the_same_with_what_we_write(tmp_path: Path) -> None:
    source = trained([True, True, True])
    torch.save(lora.lora_state_dict(source), tmp_path / "source.pt")
    known = Assumptions(alpha=ALPHA)
    where = base(source, tmp_path / "base")
    convert(str(tmp_path / "source.pt"), str(tmp_path / "peft"), to="peft", base=where, assumptions=known)
    convert(str(tmp_path / "peft"), str(tmp_path / "out"), to="loralib")
    settings = json.loads((tmp_path / "out" / "lora_settings.json").read_text())
    # The grouped layer and the convolution come back as plain ones of a larger rank.
    net = nn.Module()
    fields = {"r": settings["r"], "lora_alpha": settings["lora_alpha"]}
    net.wte, net.q = lora.Embedding(11, 6, **fields), lora.Linear(6, 8, **fields)
    net.c_attn, net.conv = lora.Linear(8, 12, **fields), lora.Conv2d(2, 4, 3, **fields)
    weights = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    others = {name: value for name, value in source.state_dict().items() if "lora_" not in name}
    missing, unexpected = net.load_state_dict({**others, **weights}, strict=False)
    assert (missing, unexpected) == ([], [])
    source.train()
    net.train()
    numbers = torch.arange(11)
    with torch.no_grad():
        found = net.c_attn(net.q(net.wte(numbers))), net.conv(torch.ones(1, 2, 3, 3))
        for one, other in zip(found, source(numbers), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
