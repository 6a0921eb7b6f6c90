"""LitGPT: query, key and value apart and joined, by formulas written again; tests/upstream asks LitGPT itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bundles import bundle, tensors
from oracle import dense
from strategies import values
from torch import Tensor

from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats import litgpt
from loraformat.formats.kit.base import NO_HINTS, Hints
from loraformat.model.adapter import Adapter

LLAMA = {"name": "tiny-llama", "mlp_class_name": "LLaMAMLP", "n_head": 4, "n_query_groups": 2, "head_size": 3}
SETTINGS = {"lora_r": 2, "lora_alpha": 6, "lora_query": True, "lora_key": False, "lora_value": True}
QKV = "transformer.h.1.attn.qkv"
A, B = values(4, 8, seed=1), values(12 + 6, 2, seed=2)


def read(entries: dict[str, Tensor], settings: Any = SETTINGS, model: Any = LLAMA, hints: Hints = NO_HINTS) -> Adapter:
    files: dict[str, Any] = {"lit_model.pth.lora": tensors(entries, "torch", wrapper=("model",))}
    stated = {"hyperparameters.yaml": settings, "model_config.yaml": model}
    files |= {name: value for name, value in stated.items() if value is not None}
    return litgpt.read(bundle(files), hints=hints)


def test_query_and_value_of_unequal_length_are_cut_apart() -> None:
    adapter = read({f"{QKV}.lora_A": A, f"{QKV}.lora_B": B})
    path = "model.layers.1.self_attn"
    assert list(adapter.updates) == [f"{path}.q_proj.weight", f"{path}.v_proj.weight"]
    wanted = 3 * B[:12].double() @ A[:2].double(), 3 * B[12:].double() @ A[2:].double()
    for weight, value in zip(adapter.updates, wanted, strict=True):
        torch.testing.assert_close(dense(adapter.updates[weight][0]), value, rtol=1e-12, atol=1e-12)
    assert set(adapter.config.declared_ranks.values()) == {2}


def test_joined_rows_are_interleaved_by_groups() -> None:
    """GPT-NeoX and Falcon: the queries of a group, then its key, then its value."""
    model = {"name": "falcon-x", "n_head": 4, "n_query_groups": 2, "n_embd": 12}
    (update,) = read({f"{QKV}.lora_A": A, f"{QKV}.lora_B": B}, model=model).updates[
        "transformer.h.1.self_attention.query_key_value.weight"
    ]
    query, value = 3 * B[:12].double() @ A[:2].double(), 3 * B[12:].double() @ A[2:].double()
    none = torch.zeros(3, 8).double()
    wanted = torch.cat([query[:6], none, value[:3], query[6:], none, value[3:]])
    torch.testing.assert_close(dense(update), wanted, rtol=1e-12, atol=1e-12)
    assert update.rank == 4


@pytest.mark.parametrize("old", ["attn.attn", "attn.c_attn"])
def test_older_names_are_read(old: str) -> None:
    path = f"transformer.h.1.{old}"
    adapter = read({f"{path}.lora_A": A, f"{path}.lora_B": B})
    assert len(adapter.updates) == 2


def test_phi_3_joins_gate_and_up() -> None:
    model = {**LLAMA, "name": "Phi-3-mini"}
    entries = {
        f"transformer.h.0.mlp.{name}.lora_{part}": values(*shape, seed=seed)
        for seed, (name, part, shape) in enumerate(
            [("fc_1", "A", (2, 8)), ("fc_1", "B", (5, 2)), ("fc_2", "A", (2, 8)), ("fc_2", "B", (5, 2))]
        )
    }
    (update,) = read(entries, model=model).updates["model.layers.0.mlp.gate_up_proj.weight"]
    halves = [
        3 * entries[f"transformer.h.0.mlp.{n}.lora_B"].double() @ entries[f"transformer.h.0.mlp.{n}.lora_A"].double()
        for n in ("fc_1", "fc_2")
    ]
    torch.testing.assert_close(dense(update), torch.cat(halves), rtol=1e-12, atol=1e-12)
    del entries["transformer.h.0.mlp.fc_2.lora_A"], entries["transformer.h.0.mlp.fc_2.lora_B"]
    with pytest.raises(UnsupportedUpdate, match="only one of fc_1 and fc_2"):
        read(entries, model=model)


def test_what_the_settings_would_say_can_be_assumed() -> None:
    entries = {f"{QKV}.lora_A": A, f"{QKV}.lora_B": B}
    with pytest.raises(ConfigError, match=r"2 of query, key and value are adapted.*enable_lora"):
        read(entries, settings=None)
    assumed = Hints(alpha=6, enable_lora=(True, False, True))
    for weight, chain in read(entries, settings=None, hints=assumed).updates.items():
        assert torch.equal(dense(chain[0]), dense(read(entries).updates[weight][0]))
    with pytest.raises(MissingFile, match=r"model_config\.yaml"):
        read(entries, model=None)


def test_the_base_is_called_as_the_hub_has_it() -> None:
    entries = {f"{QKV}.lora_A": A, f"{QKV}.lora_B": B}
    settings = {**SETTINGS, "checkpoint_dir": "checkpoints/meta-llama/Llama-3"}
    assert read(entries, settings).config.base_model == "checkpoints/meta-llama/Llama-3"
    named = {**LLAMA, "hf_config": {"org": "meta-llama", "name": "Llama-3.1-8B"}}
    assert read(entries, settings, named).config.base_model == "meta-llama/Llama-3.1-8B"


def test_factors_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected A \(4, in\) and B \(18, 2\)"):
        read({f"{QKV}.lora_A": A, f"{QKV}.lora_B": B[:16]})
    with pytest.raises(ConfigError, match="cannot be shared by 3 groups"):
        read({f"{QKV}.lora_A": A, f"{QKV}.lora_B": B}, model={**LLAMA, "n_query_groups": 3})
    with pytest.raises(UnsupportedUpdate, match="not known"):
        read({"transformer.h.0.mlp.odd.lora_A": A[:2], "transformer.h.0.mlp.odd.lora_B": B[:, :2]})
