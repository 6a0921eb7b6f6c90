"""torchtune's own files: names and the order of rows, by formulas written again."""

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
from loraformat.formats import torchtune
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter

SETTINGS = {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ["q_proj"]}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
Q, K, V = (f"layers.1.attn.{name}_proj" for name in "qkv")


def pair(module: str, rows: int, seed: int, cols: int = 16) -> dict[str, Tensor]:
    a, b = values(2, cols, seed=seed), values(rows, 2, seed=seed + 1)
    return {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}


def product(entries: dict[str, Tensor], module: str) -> Tensor:
    return 3 * entries[f"{module}.lora_b.weight"].double() @ entries[f"{module}.lora_a.weight"].double()


def read(entries: dict[str, Tensor], model_type: str | None = None, **files: Any) -> Adapter:
    config = {} if model_type is None else {"model_type": model_type, **HEADS}
    found = bundle({"adapter_model.pt": entries, "adapter_config.json": SETTINGS, **files})
    assert formats.detect(found)[0] is torchtune
    return torchtune.read(found, hints=Hints(config=config))


def in_hugging_face_s_order(rows: Tensor, heads: int) -> Tensor:
    """As torchtune's converter of whole checkpoints does it, with views."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma", "gemma2"])
def test_q_and_k_are_taken_out_of_the_interleaved_order(model_type: str) -> None:
    entries = {**pair(Q, 16, 1), **pair(K, 8, 3), **pair(V, 8, 5)}
    updates = read(entries, model_type).updates
    path = "model.layers.1.self_attn"
    for module, name, heads in ((Q, "q_proj", 4), (K, "k_proj", 2)):
        wanted = in_hugging_face_s_order(product(entries, module), heads)
        torch.testing.assert_close(dense(updates[f"{path}.{name}.weight"][0]), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(updates[f"{path}.v_proj.weight"][0]), product(entries, V), rtol=1e-12, atol=1e-12)


def test_qwen_2_s_rows_stay_where_they_are() -> None:
    """The export to PEFT, which turns them too, is not what is read."""
    entries = pair(Q, 16, 1)
    export = {f"base_model.model.model.layers.1.self_attn.q_proj.lora_{n}.weight": values(2, 2) for n in "AB"}
    (update,) = read(entries, "qwen2", **{"adapter_model.safetensors": export}).updates.values()
    torch.testing.assert_close(dense(update[0]), product(entries, Q), rtol=1e-12, atol=1e-12)


def test_a_magnitude_goes_with_its_rows() -> None:
    magnitude = values(16, seed=9).abs()
    (update,) = read({**pair(Q, 16, 1), f"{Q}.magnitude": magnitude}, "llama").updates[
        "model.layers.1.self_attn.q_proj.weight"
    ]
    wanted = in_hugging_face_s_order(magnitude.view(16, 1), 4).flatten()
    assert torch.equal(update.magnitude.vector.torch(), wanted)


def test_phi_3_joins_q_k_and_v_and_gate_and_up() -> None:
    gate, up = "layers.1.mlp.w1", "layers.1.mlp.w3"
    entries = {**pair(Q, 16, 1), **pair(V, 8, 3), **pair(gate, 10, 5), **pair(up, 10, 7)}
    updates = read(entries, "phi3").updates
    wanted = torch.cat([product(entries, Q), torch.zeros(8, 16).double(), product(entries, V)])
    joined = dense(updates["model.layers.1.self_attn.qkv_proj.weight"][0])
    torch.testing.assert_close(joined, wanted, rtol=1e-12, atol=1e-12)
    wanted = torch.cat([product(entries, gate), product(entries, up)])
    joined = dense(updates["model.layers.1.mlp.gate_up_proj.weight"][0])
    torch.testing.assert_close(joined, wanted, rtol=1e-12, atol=1e-12)
    assert len(updates) == 2


def test_a_joined_weight_of_which_one_part_has_a_magnitude_is_refused() -> None:
    gate, up = "layers.1.mlp.w1", "layers.1.mlp.w3"
    entries = {**pair(gate, 10, 5), **pair(up, 10, 7), f"{gate}.magnitude": values(10).abs()}
    with pytest.raises(UnsupportedUpdate, match="no magnitude"):
        read(entries, "phi3")


def test_without_a_base_the_order_of_q_is_not_guessed() -> None:
    with pytest.raises(UnsupportedUpdate, match="no base is given"):
        read(pair(Q, 16, 1))
    assert list(read(pair(V, 8, 1)).updates) == ["model.layers.1.self_attn.v_proj.weight"]


@pytest.mark.parametrize("model_type", ["mllama", "gpt2"])
def test_a_base_that_torchtune_does_not_convert_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedUpdate, match=model_type):
        read(pair(V, 8, 1), model_type)


def test_another_base_s_heads_are_noticed() -> None:
    with pytest.raises(ConfigError, match="expected 16 rows in lora_b, as the base has 4 heads of 4 rows; found 24"):
        read(pair(Q, 24, 1), "llama")


def test_the_head_and_names_of_one_file_are_read() -> None:
    entries = {**pair("output", 20, 1), **pair("layers.0.mlp.w2", 16, 3)}
    found = bundle({"adapter_0.pt": entries}, single=True)
    assert formats.detect(found)[0] is torchtune
    assert list(torchtune.read(found).updates) == ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"]


def test_an_unknown_module_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedUpdate, match=r"layers\.1\.mlp\.w9"):
        read({**pair(V, 8, 1), **pair("layers.1.mlp.w9", 8, 3)}, "llama")
