"""NeMo's archives and Megatron's names: joined rows cut apart, by formulas written again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle, tensors
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat import formats
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats import nemo
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter
from loraformat.model.bundle import Bundle, TensorFile

MODEL = {"hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2}
TUNING = {"peft": {"lora_tuning": {"adapter_dim": 2, "alpha": 8}}}
LAYER = "model.decoder.layers.1"
QKV = f"{LAYER}.self_attention.adapter_layer.lora_kqv_adapter"


def pair(module: str, rows: int, seed: int = 1) -> dict[str, Tensor]:
    return {
        f"{module}.linear_in.weight": values(2, 16, seed=seed),
        f"{module}.linear_out.weight": values(rows, 2, seed=seed + 1),
    }


def product(entries: dict[str, Tensor], module: str) -> Tensor:
    return 4 * entries[f"{module}.linear_out.weight"].double() @ entries[f"{module}.linear_in.weight"].double()


def files(entries: dict[str, Tensor], config: Any) -> Bundle:

    weights = tensors(entries, "torch")
    found = bundle({"model_config.yaml": config})
    return Bundle("memory", {**found.files, "model_weights.ckpt": TensorFile("model_weights.ckpt", 0, lambda: weights)})


def read(entries: dict[str, Tensor], **fields: Any) -> Adapter:
    found = files(entries, {**MODEL, **TUNING, **fields})
    assert formats.detect(found)[0] is nemo
    return nemo.read(found)


@pytest.mark.parametrize(("fields", "size"), [({}, 4), ({"kv_channels": 6}, 6)])
def test_joined_rows_are_grouped_by_key_head(fields: dict[str, int], size: int) -> None:
    entries = pair(QKV, 8 * size)
    updates = read(entries, **fields).updates
    groups = product(entries, QKV).view(2, 4, size, 16)  # two groups of two queries, a key and a value
    wanted = {"q_proj": groups[:, :2], "k_proj": groups[:, 2], "v_proj": groups[:, 3]}
    assert len(updates) == 3
    for name, rows in wanted.items():
        found = dense(updates[f"model.layers.1.self_attn.{name}.weight"][0])
        torch.testing.assert_close(found, rows.reshape(-1, 16), rtol=1e-12, atol=1e-12)


def test_gate_stands_above_up() -> None:
    module = f"{LAYER}.mlp.adapter_layer.lora_hto4h_adapter"
    entries = pair(module, 10)
    updates = read(entries).updates
    halves = [dense(updates[f"model.layers.1.mlp.{name}_proj.weight"][0]) for name in ("gate", "up")]
    torch.testing.assert_close(torch.cat(halves), product(entries, module), rtol=1e-12, atol=1e-12)


def test_megatron_bridge_s_names_take_the_heads_of_the_base() -> None:
    module = "decoder.layers.0.self_attention.linear_qkv.adapter"
    found = bundle({"adapter.safetensors": {**pair(module, 32), **pair("decoder.layers.0.mlp.linear_fc2.adapter", 16)}})
    assert formats.detect(found)[0] is nemo
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    updates = nemo.read(found, hints=Hints(alpha=2, config=config)).updates
    assert {name.rpartition(".layers.0.")[2] for name in updates} == {
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        "mlp.down_proj.weight",
    }
    with pytest.raises(UnsupportedUpdate) as caught:
        nemo.read(found)
    assert "--base" in caught.value.hint


@pytest.mark.parametrize(
    "module",
    [
        "self_attention.adapter_layer.lora_dense_attention_adapter",
        "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter",
        "self_attention.linear_qkv.adapter.adapter_v",
        "mlp.linear_fc1.adapter.adapter_gate",
    ],
)
def test_what_is_not_joined_is_taken_as_it_is(module: str) -> None:
    entries = pair(f"{LAYER}.{module}", 8)
    (update,) = read(entries).updates.values()
    torch.testing.assert_close(dense(update[0]), product(entries, f"{LAYER}.{module}"), rtol=1e-12, atol=1e-12)


def test_rows_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 query and 2 key heads of 4 rows make 32 rows, linear_out has 30"):
        read(pair(QKV, 30))


@pytest.mark.parametrize(
    ("entries", "fields", "said"),
    [
        (pair(f"{LAYER}.mlp.adapter_layer.lora_moe_hto4h_adapter", 8), {}, "is unknown"),
        (pair(QKV, 32), {"activation": "gelu"}, "without a gate"),
        ({**pair(QKV, 32), f"{LAYER}.self_attention.linear_qkv.adapter.weight_magnitude": values(32)}, {}, "DoRA"),
    ],
)
def test_what_is_not_known_is_refused_by_name(entries: dict[str, Tensor], fields: Any, said: str) -> None:
    with pytest.raises(UnsupportedUpdate, match=said):
        read(entries, **fields)


def test_parts_of_a_parallel_run_are_refused() -> None:
    found = bundle({"model_config.yaml": {**MODEL, **TUNING}})
    parts = Bundle("memory", found.files, folders=("mp_rank_00", "mp_rank_01"))
    assert formats.detect(parts)[0] is nemo
    with pytest.raises(MissingFile, match="2 parallel ranks"):
        nemo.read(parts)
