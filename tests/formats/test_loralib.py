"""loralib: its four kinds of layers against its own formulas, and what it asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle, loaded, tensors
from oracle import dense
from strategies import lazy, values
from torch import Tensor
from torch.nn.functional import conv1d

from loraformat.errors import ConfigError
from loraformat.formats import loralib
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import LowRank, Replace

ALPHA = Hints(alpha=4)


def read(entries: dict[str, Tensor], hints: Hints = ALPHA, **extras: Any) -> Adapter:
    file = tensors(entries, "torch", **extras)
    return loralib.read(bundle({"model.pt": file}, single=True), hints=hints)


def grouped(a: Tensor, b: Tensor, enabled: list[bool]) -> Tensor:
    """MergedLinear's own way: a grouped convolution, then zeros where nothing is adapted."""
    delta = conv1d(a.double()[None], b.double()[..., None], groups=sum(enabled))[0]
    rows = iter(delta.chunk(sum(enabled)))
    height = delta.shape[0] // sum(enabled)
    return torch.cat([next(rows) if on else torch.zeros(height, a.shape[1]).double() for on in enabled])


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, True], [True, True, True, False]])
def test_joined_parts_are_one_update_with_zeros_between(enabled: list[bool]) -> None:
    count = sum(enabled)
    a, b = values(2 * count, 5, seed=1), values(3 * count, 2, seed=2)
    hints = replace(ALPHA, enable_lora=tuple(enabled), rank=2)
    adapter = read({"c_attn.lora_A": a, "c_attn.lora_B": b}, hints)
    (update,) = adapter.updates["c_attn.weight"]
    torch.testing.assert_close(dense(update), 2 * grouped(a, b, enabled), rtol=1e-12, atol=1e-12)
    assert update.scale == 2
    assert adapter.config.declared_ranks == {"c_attn.weight": 2 * count}
    assert np.array_equal(update.up.read(2, 4), update.up.load()[2:4])


def test_which_parts_are_adapted_is_asked_for() -> None:
    entries = {"c_attn.lora_A": values(4, 5), "c_attn.lora_B": values(6, 2)}
    with pytest.raises(ConfigError, match=r"2 parts .* does not say.*enable_lora=\[true,false,true\]"):
        read(entries)
    with pytest.raises(ConfigError, match="enable_lora gives 3"):
        read(entries, replace(ALPHA, enable_lora=(True, True, True)))
    with pytest.raises(ConfigError, match="do not fit the weight"):
        read(entries, replace(ALPHA, enable_lora=(True, False, True), weights={"c_attn.weight": (12, 5)}))
    all_of_them = read(entries, replace(ALPHA, weights={"c_attn.weight": (6, 5)}))
    assert all_of_them.updates["c_attn.weight"][0].shape == (6, 5)


def test_one_part_of_three_needs_the_rows_of_the_base() -> None:
    a, b = values(2, 5, seed=1), values(3, 2, seed=2)
    hints = replace(ALPHA, enable_lora=(False, True, False), weights={"c_attn.weight": (9, 5), "q.weight": (3, 5)})
    adapter = read({"c_attn.lora_A": a, "c_attn.lora_B": b, "q.lora_A": a, "q.lora_B": b}, hints)
    wanted = 2 * grouped(a, b, [False, True, False])
    torch.testing.assert_close(dense(adapter.updates["c_attn.weight"][0]), wanted, rtol=1e-12, atol=1e-12)
    assert adapter.updates["q.weight"][0].shape == (3, 5)


def test_a_convolution_is_the_view_of_its_product() -> None:
    a, b = values(2 * 3, 2 * 3, seed=1), values(4 * 3, 2 * 3, seed=2)
    adapter = read({"conv.lora_A": a, "conv.lora_B": b}, replace(ALPHA, weights={"conv.weight": (4, 2, 3, 3)}))
    (update,) = adapter.updates["conv.weight"]
    wanted = 2 * (b.double() @ a.double()).reshape(4, 2, 3, 3)
    torch.testing.assert_close(dense(update), wanted, rtol=1e-12, atol=1e-12)
    assert update.kernel == (3, 3)
    assert update.scale == 2


def test_an_embedding_is_told_by_the_base_and_never_guessed() -> None:
    a, b = values(2, 9, seed=1), values(4, 2, seed=2)
    entries = {"wte.lora_A": a, "wte.lora_B": b}
    with pytest.raises(ConfigError, match=r"embedding.*--base"):
        read(entries)
    (update,) = read(entries, replace(ALPHA, weights={"wte.weight": (9, 4)})).updates["wte.weight"]
    torch.testing.assert_close(dense(update), 2 * (b.double() @ a.double()).T, rtol=1e-12, atol=1e-12)
    assert update.is_embedding


def test_a_transposed_weight_of_another_name_is_asked_about() -> None:
    entries = {"c_fc.lora_A": values(2, 9, seed=1), "c_fc.lora_B": values(4, 2, seed=2)}
    hints = replace(ALPHA, weights={"c_fc.weight": (9, 4)})
    with pytest.raises(ConfigError, match="fan_in_fan_out=true"):
        read(entries, hints)
    assert read(entries, replace(hints, fan_in_fan_out=True)).updates["c_fc.weight"][0].shape == (4, 9)
    assert read(entries, replace(hints, fan_in_fan_out=False)).updates["c_fc.weight"][0].is_embedding


def test_biases_beside_the_factors_replace_the_bases() -> None:
    adapter = read({"q.lora_A": values(2, 5), "q.lora_B": values(7, 2), "q.bias": values(7), "ln.bias": values(5)})
    assert [type(adapter.updates[name][0]) for name in ("q.bias", "ln.bias")] == [Replace, Replace]
    assert not adapter.unclaimed


def test_what_the_file_cannot_say_stands_beside_it() -> None:
    conv = LowRank(lazy(4, 2), lazy(2, 3 * 4, seed=1), 1.5, kernel=(2, 2))
    table = LowRank(lazy(9, 2), lazy(2, 3, seed=1), 1.5, is_embedding=True)
    updates = {"conv.weight": (conv,), "e.weight": (table,), "norm.weight": (Replace(lazy(3)),)}
    written = loaded(loralib.write(Adapter(config=AdapterConfig(), updates=updates)))
    assert sorted(written) == ["lora.pt", "lora_settings.json"]
    assert written["lora_settings.json"] == {
        "lora_alpha": 3,
        "r": 2,
        "embeddings": ["e"],
        "kernel_sizes": {"conv": 2},
        "replaced": ["norm.weight"],
    }
    a, b = written["lora.pt"]["conv.lora_A"].double(), written["lora.pt"]["conv.lora_B"].double()
    torch.testing.assert_close(1.5 * (b @ a).reshape(4, 3, 2, 2), dense(conv), rtol=1e-12, atol=1e-12)
    again = loralib.read(bundle(written), hints=NO_HINTS)
    assert again.updates["e.weight"][0].is_embedding
    assert list(again.updates) == ["conv.weight", "e.weight", "norm.weight"]


def test_rows_of_a_spread_factor_are_those_of_the_whole() -> None:
    up = LowRank(lazy(4, 2), lazy(2, 3 * 9), 1.0, kernel=(3, 3))
    bundle_ = loralib.write(Adapter(config=AdapterConfig(), updates={"conv.weight": (up,)}))
    spread = bundle_.tensors("lora.pt").entries["conv.lora_B"]
    whole = spread.torch()
    assert all(np.array_equal(spread.read(n, m), whole[n:m]) for n in range(12) for m in range(n, 13))
