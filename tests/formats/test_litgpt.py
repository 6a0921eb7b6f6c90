"""LitGPT: query, key and value apart and joined, by formulas written again; tests/upstream asks LitGPT itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml
from bundles import bundle, content_of, loaded, tensors
from oracle import dense
from strategies import lazy, values
from torch import Tensor

from loraformat.diagnostics import Severity
from loraformat.errors import ConfigError, MissingFile, UnsupportedUpdate
from loraformat.formats import litgpt
from loraformat.formats.kit.base import NO_HINTS, Hints, WriteOptions
from loraformat.formats.litgpt.model_config import model_config
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import LowRank, Magnitude, Replace

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
    with pytest.raises(ConfigError, match="cannot be divided among 3 groups"):
        read({f"{QKV}.lora_A": A, f"{QKV}.lora_B": B}, model={**LLAMA, "n_query_groups": 3})
    with pytest.raises(UnsupportedUpdate, match="is unknown"):
        read({"transformer.h.0.mlp.odd.lora_A": A[:2], "transformer.h.0.mlp.odd.lora_B": B[:, :2]})


SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "num_attention_heads": 2}
BASE = {"model_type": "llama", "num_key_value_heads": 1, **SIZES}
Q, V, DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def options(config: Any = BASE) -> WriteOptions:
    return WriteOptions(base=Hints(config=config))


def adapter(updates: dict[str, Any]) -> Adapter:
    return Adapter(config=AdapterConfig(base_model="a/Llama-b"), updates={name: (up,) for name, up in updates.items()})


def refusals(made: Adapter, config: Any = BASE) -> list[str]:
    return [each.message for each in litgpt.losses(made, options(config)) if each.severity is Severity.ERROR]


def test_layers_and_ranks_that_it_does_not_have_are_filled_with_zeros() -> None:
    """It adapts a group of modules in all layers, with one rank: the rest are zeros, and the loss is reported."""
    pairs = {Q: LowRank(lazy(8, 2), lazy(2, 8, seed=1), 1.5), DOWN: LowRank(lazy(8, 3), lazy(3, 12, seed=1), 0.75)}
    made = adapter(pairs)
    assert [each.code for each in litgpt.losses(made, options())] == ["LF701", "LF707", "LF707", "LF709"]
    written = litgpt.write(made, options())
    tensors_ = content_of(written.files["lit_model.pth.lora"])
    assert {name: tuple(value.shape) for name, value in tensors_.items()} == {
        f"transformer.h.{layer}.{module}.lora_{part}": shape
        for layer in range(2)
        for module, part, shape in [
            ("attn.qkv", "A", (3, 8)),
            ("attn.qkv", "B", (8, 3)),
            ("mlp.fc_1", "A", (3, 8)),
            ("mlp.fc_1", "B", (12, 3)),
            ("mlp.fc_2", "A", (3, 8)),
            ("mlp.fc_2", "B", (12, 3)),
            ("mlp.proj", "A", (3, 12)),
            ("mlp.proj", "B", (8, 3)),
        ]
    }
    assert not any(value.any() for name, value in tensors_.items() if ".h.0." in name or "fc_" in name)
    settings = written.files["hyperparameters.yaml"].load()
    assert settings["lora_r"] == 3
    assert settings["checkpoint_dir"] == "checkpoints/a/Llama-b"
    assert sorted(name for name, value in settings.items() if value is True) == ["lora_mlp", "lora_query"]
    back = litgpt.read(bundle(loaded(written)))
    for weight, update in pairs.items():
        torch.testing.assert_close(dense(back.updates[weight][0]), dense(update), rtol=1e-6, atol=1e-6)


def test_a_joined_weight_is_cut_and_its_rows_put_in_order() -> None:
    """GPT-NeoX keeps query, key and value of each head together; LitGPT's A is repeated for the three parts."""
    config = {**SIZES, "model_type": "gpt_neox", "intermediate_size": 32}
    weight = "gpt_neox.layers.0.attention.query_key_value.weight"
    update = LowRank(lazy(24, 2), lazy(2, 8, seed=1), 1.5)
    written = litgpt.write(adapter({weight: update}), options(config))
    factors = content_of(written.files["lit_model.pth.lora"])
    a, b = (factors[f"transformer.h.0.attn.qkv.lora_{part}"].double() for part in "AB")
    found = 1.5 * torch.cat([b[8 * part : 8 * part + 8] @ a[2 * part : 2 * part + 2] for part in range(3)])
    in_heads = dense(update).reshape(2, 3, 4, 8).transpose(0, 1).reshape(24, 8)
    torch.testing.assert_close(found, in_heads, rtol=1e-12, atol=1e-12)
    again = litgpt.read(bundle(loaded(written))).updates[weight][0]
    torch.testing.assert_close(dense(again), dense(update), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("weight", "update", "message"),
    [
        ("model.embed_tokens.weight", LowRank(lazy(20, 2), lazy(2, 8), 1.0, is_embedding=True), "of an embedding"),
        (Q, LowRank(lazy(8, 2), lazy(2, 8), 1.0, Magnitude(lazy(8))), "a DoRA magnitude"),
        (Q, LowRank(lazy(9, 2), lazy(2, 8), 1.0), r"whose shape is not \(8, 8\)"),
        ("model.layers.2.self_attn.q_proj.weight", LowRank(lazy(8, 2), lazy(2, 8), 1.0), "it does not adapt"),
        ("model.norm.weight", Replace(lazy(8)), "a full weight"),
    ],
)
def test_what_it_has_no_place_for_is_refused(weight: str, update: Any, message: str) -> None:
    plain = LowRank(lazy(4, 2), lazy(2, 8), 1.0)
    (found,) = refusals(adapter({V: plain, weight: update}))
    assert re.search(message, found)


def test_a_base_that_it_cannot_be_told_about_is_refused() -> None:
    made = adapter({Q: LowRank(lazy(8, 2), lazy(2, 8), 1.0)})
    for config, message in [
        ({}, "unknown base"),
        ({**BASE, "model_type": "gemma3"}, "model_type gemma3"),
        ({**BASE, "mlp_bias": True}, "mlp_bias True"),
        ({**BASE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of the type yarn"),
        ({**BASE, "vocab_size": None}, "positive integer|an integer"),
    ]:
        assert re.search(message, " ".join(refusals(made, config)))


def test_numbers_stay_numbers_in_yaml() -> None:
    """1e-06 is a text for YAML 1.1, by which LitGPT reads; 1.0e-06 is a number."""
    made = adapter({Q: LowRank(lazy(8, 2), lazy(2, 8), 1e-7)})
    config = {**BASE, "rms_norm_eps": 1e-06}
    written = litgpt.write(made, options(config))
    read_back = {
        name: yaml.safe_load(written.files[name].read()) for name in ("hyperparameters.yaml", "model_config.yaml")
    }
    assert read_back["model_config.yaml"] == model_config(config, "a/Llama-b")
    assert read_back["model_config.yaml"]["norm_eps"] == 1e-06
    assert read_back["hyperparameters.yaml"]["lora_alpha"] == 2e-7
