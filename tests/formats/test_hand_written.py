"""minLoRA, minimind and the layers of "LLMs from scratch": orientation, scale, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat.errors import ConfigError
from loraformat.formats import minimind, minlora, raschka
from loraformat.formats.kit.base import NO_HINTS, Format, Hints
from loraformat.model.adapter import Adapter

A, B = values(2, 5, seed=1), values(7, 2, seed=2)


def read(each: Format, entries: dict[str, Tensor], hints: Hints = NO_HINTS) -> Adapter:
    return each.read(bundle({"lora.pt": entries}, single=True), hints=hints)


def minlora_names(module: str, a: Tensor, b: Tensor) -> dict[str, Any]:
    path = f"{module}.parametrizations.weight.0"
    return {f"{path}.lora_A": a, f"{path}.lora_B": b}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_minlora_swaps_the_factors_of_an_embedding() -> None:
    a, b = values(9, 2, seed=1), values(2, 4, seed=2)
    adapter = read(minlora, {**minlora_names("q", A, B), **minlora_names("wte", a, b)}, Hints(alpha=3))
    close(dense(adapter.updates["q.weight"][0]), 1.5 * B.double() @ A.double())
    close(dense(adapter.updates["wte.weight"][0]), 1.5 * a.double() @ b.double())
    assert adapter.updates["wte.weight"][0].is_embedding


def test_minlora_takes_a_kernel_from_the_base() -> None:
    a, b = values(2, 3 * 9, seed=1), values(8, 2, seed=2)
    known = Hints(scale=1, weights={"conv.weight": (8, 3, 3, 3)})
    (update,) = read(minlora, minlora_names("conv", a, b), known).updates["conv.weight"]
    close(dense(update), (b.double() @ a.double()).reshape(8, 3, 3, 3))


def test_minlora_asks_where_shapes_do_not_decide() -> None:
    square = minlora_names("q", values(3, 3), values(3, 3))
    with pytest.raises(ConfigError, match="the shapes fit both"):
        read(minlora, square)
    with pytest.raises(ConfigError, match="no common rank"):
        read(minlora, minlora_names("q", values(2, 5), values(7, 3)))
    with pytest.raises(ConfigError, match=r"the weight is \(7, 6\)"):
        read(minlora, minlora_names("q", A, B), Hints(weights={"q.weight": (7, 6)}))


def test_raschka_has_both_factors_turned() -> None:
    entries = {"out_head.lora.A": A.T.contiguous(), "out_head.lora.B": B.T.contiguous()}
    close(dense(read(raschka, entries, Hints(alpha=6)).updates["out_head.weight"][0]), 3 * B.double() @ A.double())
    first_printing = read(raschka, entries, Hints(scale=6))
    close(dense(first_printing.updates["out_head.weight"][0]), 6 * B.double() @ A.double())
    assert read(raschka, entries).updates["out_head.weight"][0].scale is None
    with pytest.raises(ConfigError, match="--from dump"):
        read(raschka, {"q.lora.A": A, "q.lora.B": B})


def test_minimind_has_no_alpha() -> None:
    entries = {"module.q.lora.A.weight": A, "module.q.lora.B.weight": B}
    adapter = read(minimind, entries)
    close(dense(adapter.updates["q.weight"][0]), B.double() @ A.double())
    assert sorted(note.code for note in adapter.notes) == ["LF221", "LF241"]
    said = read(minimind, entries, Hints(alpha=4))
    assert said.updates["q.weight"][0].scale == 2
    assert [note.code for note in said.notes] == ["LF221"]


def test_copies_of_a_whole_model_are_left_out() -> None:
    entries = {"q.lora.A": A.T.contiguous(), "q.lora.B": B.T.contiguous(), "q.linear.weight": values(7, 5)}
    adapter = read(raschka, {**entries, "q.linear.bias": values(7), "norm.scale": values(5)}, Hints(alpha=6))
    assert [note.code for note in adapter.notes] == ["LF203", "LF240"]
    known = Hints(alpha=6, weights={"q.weight": (7, 5), "q.bias": (7,), "norm.scale": (5,)})
    compared = read(raschka, {**entries, "q.linear.bias": values(7), "norm.scale": values(5)}, known)
    assert sorted(compared.updates) == ["norm.scale", "q.bias", "q.weight"]
