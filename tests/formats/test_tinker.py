"""Tinker's downloads: shared factors, joined experts and the head, by formulas written again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat import formats
from loraformat.errors import ConfigError, UnsupportedUpdate
from loraformat.formats import tinker
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.model.adapter import Adapter

CONFIG = {"r": 2, "lora_alpha": 8}
EXPERTS = "model.layers.0.mlp.experts"
P = "base_model.model."


def stack(layer: str, out: int, cols: int, seed: int, *, shared: str) -> dict[str, Tensor]:
    a = values(1 if shared == "A" else 3, 2, cols, seed=seed)
    b = values(1 if shared == "B" else 3, out, 2, seed=seed + 1)
    return {f"{P}{EXPERTS}.{layer}.lora_A.weight": a, f"{P}{EXPERTS}.{layer}.lora_B.weight": b}


MOE = {
    **stack("w1", 5, 8, 1, shared="A"),
    **stack("w3", 5, 8, 3, shared="A"),
    **stack("w2", 8, 5, 5, shared="B"),
}


def product(layer: str) -> Tensor:
    """(experts, out, in), times alpha / r."""
    a, b = (MOE[f"{P}{EXPERTS}.{layer}.lora_{n}.weight"].double() for n in "AB")
    return 4 * torch.einsum("eor,eri->eoi", b.expand(3, -1, -1), a.expand(3, -1, -1))


def read(entries: dict[str, Tensor], hints: Hints = NO_HINTS, config: Any = CONFIG) -> Adapter:
    found = bundle({"adapter_model.safetensors": entries, "adapter_config.json": config})
    assert formats.detect(found)[0] is tinker
    return tinker.read(found, hints=hints)


def test_experts_of_their_own_each_get_the_shared_factor() -> None:
    updates = read(MOE).updates
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    assert len(updates) == 9
    for layer, name in names.items():
        for expert in range(3):
            found = dense(updates[f"{EXPERTS}.{expert}.{name}.weight"][0])
            torch.testing.assert_close(found, product(layer)[expert], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_a_base_that_joins_gate_and_up_gets_one_update(model_type: str) -> None:
    """gpt-oss takes their rows in turn, others put them one above the other."""
    weights = {f"{EXPERTS}.gate_up_proj": (3, 8, 10), f"{EXPERTS}.down_proj": (3, 5, 8)}
    updates = read(MOE, Hints(weights=weights, config={"model_type": model_type})).updates
    gate, up = product("w1"), product("w3")
    wanted = torch.stack([gate, up], dim=2).reshape(3, 10, 8) if model_type == "gpt_oss" else torch.cat([gate, up], 1)
    torch.testing.assert_close(dense(updates[f"{EXPERTS}.gate_up_proj"][0]), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(updates[f"{EXPERTS}.down_proj"][0]), product("w2"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("absent", ["w1", "w3"])
def test_one_half_alone_leaves_the_rows_of_the_other(absent: str) -> None:
    weights = {f"{EXPERTS}.gate_up_proj": (3, 8, 10), f"{EXPERTS}.down_proj": (3, 5, 8)}
    entries = {name: value for name, value in MOE.items() if f".{absent}." not in name}
    found = dense(read(entries, Hints(weights=weights, config={})).updates[f"{EXPERTS}.gate_up_proj"][0])
    halves = [torch.zeros(3, 5, 8).double() if layer == absent else product(layer) for layer in ("w1", "w3")]
    torch.testing.assert_close(found, torch.cat(halves, 1), rtol=1e-12, atol=1e-12)


HEAD = {f"{P}model.unembed_tokens.lora_{n}.weight": values(*shape) for n, shape in (("A", (2, 8)), ("B", (12, 2)))}


def test_the_head_is_lm_head_or_the_tied_table() -> None:
    assert list(read(HEAD).updates) == ["lm_head.weight"]
    untied = Hints(weights={"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8)})
    assert list(read(HEAD, untied).updates) == ["lm_head.weight"]
    tied = read(HEAD, Hints(weights={"model.embed_tokens.weight": (12, 8)})).updates
    assert list(tied) == ["model.embed_tokens.weight"]
    (update,) = tied["model.embed_tokens.weight"]
    assert update.is_embedding
    wanted = (
        4
        * HEAD[f"{P}model.unembed_tokens.lora_B.weight"].double()
        @ HEAD[f"{P}model.unembed_tokens.lora_A.weight"].double()
    )
    torch.testing.assert_close(dense(update), wanted, rtol=1e-12, atol=1e-12)


def test_gpt_oss_s_attention_has_another_name() -> None:
    module = f"{P}model.layers.0.attn.q_proj"
    entries = {f"{module}.lora_A.weight": values(2, 8), f"{module}.lora_B.weight": values(6, 2)}
    assert list(read(entries, Hints(config={"model_type": "gpt_oss"})).updates) == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


@pytest.mark.parametrize(
    "change",
    [{f"{P}{EXPERTS}.w1.lora_B.weight": values(2, 5, 2)}, {f"{P}{EXPERTS}.w1.lora_A.weight": values(1, 3, 8)}],
)
def test_factors_that_do_not_fit_are_refused(change: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError):
        read({**MOE, **stack("w1", 5, 8, 1, shared=""), **change})


def test_peft_s_config_without_a_kind_is_not_taken_for_tinker_s() -> None:
    found = bundle({"adapter_model.safetensors": HEAD, "adapter_config.json": {**CONFIG, "target_modules": ["q"]}})
    assert formats.detect(found)[0].NAME == "peft"


LINEAR = "model.layers.3.linear_attn"
QKV = {
    f"{P}{LINEAR}.in_proj_{part}.lora_{side}.weight": values(*shape, seed=seed)
    for seed, (part, side, shape) in enumerate(
        (part, side, (2, 8) if side == "A" else (rows, 2))
        for part, rows in zip("qkv", (3, 3, 5), strict=True)
        for side in "AB"
    )
}


def qkv(part: str) -> Tensor:
    a, b = (QKV[f"{P}{LINEAR}.in_proj_{part}.lora_{side}.weight"].double() for side in "AB")
    return 4 * b @ a


@pytest.mark.parametrize("prefix", [None, "model.layers.3.", "model.language_model.layers.3."])
def test_qwen_3_5_s_parts_become_the_layer_that_checkpoints_join(prefix: str | None) -> None:
    weights = None if prefix is None else {f"{prefix}linear_attn.in_proj_qkv.weight": (11, 8)}
    updates = read(QKV, Hints(weights=weights)).updates
    assert list(updates) == [f"{LINEAR}.in_proj_qkv.weight"]
    wanted = torch.cat([qkv(part) for part in "qkv"])
    torch.testing.assert_close(dense(updates[f"{LINEAR}.in_proj_qkv.weight"][0]), wanted, rtol=1e-12, atol=1e-12)


def test_qwen_3_5_s_parts_stay_apart_where_the_base_has_them_apart() -> None:
    weights = {f"{LINEAR}.in_proj_{part}.weight": (3, 8) for part in "qkv"}
    assert len(read(QKV, Hints(weights=weights)).updates) == 3
    lacking = {name: value for name, value in QKV.items() if "_k." not in name}
    with pytest.raises(UnsupportedUpdate, match="not all adapted"):
        read(lacking)
    with pytest.raises(ConfigError, match="10 rows as in the base"):
        read(QKV, Hints(weights={f"{LINEAR}.in_proj_qkv.weight": (10, 8)}))


def test_nemotron_s_gate_and_x_are_the_first_rows_of_in_proj_and_its_experts_have_no_gate() -> None:
    mixer = f"{P}model.layers.0.mixer"
    entries = {
        f"{mixer}.{part}.lora_{side}.weight": values(*((2, 8) if side == "A" else (4, 2)), seed=seed)
        for seed, (part, side) in enumerate((part, side) for part in ("gate_proj", "x_proj") for side in "AB")
    }
    gate, x = (
        4 * entries[f"{mixer}.{part}.lora_B.weight"].double() @ entries[f"{mixer}.{part}.lora_A.weight"].double()
        for part in ("gate_proj", "x_proj")
    )
    experts = f"{P}model.layers.1.mixer.experts"
    entries |= {
        f"{experts}.w1.lora_A.weight": values(1, 2, 8, seed=5),
        f"{experts}.w1.lora_B.weight": values(3, 5, 2, seed=6),
        f"{experts}.w2.lora_A.weight": values(3, 2, 5, seed=7),
        f"{experts}.w2.lora_B.weight": values(1, 8, 2, seed=8),
        f"{experts}.w3.lora_A.weight": torch.empty(0),
        f"{experts}.w3.lora_B.weight": torch.empty(0),
    }
    adapter = read(entries, Hints(weights={"backbone.layers.0.mixer.in_proj.weight": (13, 8)}))
    names = {name.removeprefix("model.layers.1.mixer.experts.") for name in adapter.updates}
    assert names == {
        "model.layers.0.mixer.in_proj.weight",
        *(f"{expert}.{layer}_proj.weight" for expert in range(3) for layer in ("up", "down")),
    }
    assert not adapter.unclaimed
    wanted = torch.cat([gate, x, torch.zeros(5, 8).double()])
    found = dense(adapter.updates["model.layers.0.mixer.in_proj.weight"][0])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedUpdate, match="only the base has"):
        read(entries)
