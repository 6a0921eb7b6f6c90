"""The native format: version 0 as hand-written pipelines leave it, version 1 there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bundles import bundle, loaded
from formats.equal import assert_same_updates
from hypothesis import given, settings
from strategies import adapters, lazy, values

from loraformat.errors import AssumptionContradicted, FormatError
from loraformat.formats import native, peft
from loraformat.formats.kit.base import Hints, WriteOptions
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import Hadamard, LowRank, Replace, Rows

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def hand_written(**config: Any) -> dict[str, Any]:
    """What a small training script leaves: all in .pt, no alpha, a word list, a tied head that is absent."""
    modules = [f"blocks.{block}.attention.{name}" for block in range(2) for name in ATTENTION]
    weights = {f"{module}.lora_A": values(4, 8, seed=number) for number, module in enumerate(modules)}
    weights |= {f"{module}.lora_B": values(8, 4, seed=50 + number) for number, module in enumerate(modules)}
    return {
        "lora_config.json": {"method": "lora", "rank": 4, "target_modules": list(ATTENTION), "vocab_size": 9, **config},
        "lora_weights.pt": weights,
        "embedding_weights.pt": {"token_embedding.weight": values(9, 8)},
        "tokenizer.json": {"word_to_idx": {"<PAD>": 0}, "idx_to_word": {"0": "<PAD>"}, "vocab_size": 9},
    }


@given(adapters())
@settings(max_examples=60)
def test_what_is_written_comes_back(adapter: Adapter) -> None:
    assert list(native.losses(adapter)) == []
    for container in ("safetensors", "torch"):
        assert_same_updates(native.read(native.write(adapter, WriteOptions(container=container))), adapter)


@given(adapters(with_layer=True))
@settings(max_examples=20)
def test_equal_adapters_give_equal_configs(adapter: Adapter) -> None:
    first, second = (native.write(adapter).files["lora_config.json"] for _ in range(2))
    assert first.read() == second.read()
    again = native.write(native.read(native.write(adapter)))
    assert again.files["lora_config.json"].read() == first.read()


@pytest.mark.parametrize("ranks", [(1, 3), (3, 1)])
def test_an_alpha_that_several_modules_may_share_is_written_once_and_again(ranks: tuple[int, int]) -> None:
    """Two neighbouring floats give the same scale at rank 3."""
    scale = 48.455817815506215
    updates = {
        f"layers.{number}.q.weight": (LowRank(lazy(2, rank), lazy(rank, 2), scale / rank),)
        for number, rank in enumerate(ranks)
    }
    adapter = Adapter(config=AdapterConfig(), updates=updates)
    first = native.write(adapter)
    assert native.write(native.read(first)).files["lora_config.json"].read() == first.files["lora_config.json"].read()


def test_a_hand_written_folder_is_read_without_a_scale() -> None:
    adapter = native.read(bundle(hand_written()))
    updates = adapter.updates["blocks.0.attention.q_proj.weight"]
    assert [(type(each), each.scale) for each in updates] == [(LowRank, None)]
    assert len(adapter.updates) == 9
    (table,) = adapter.updates["token_embedding.weight"]
    assert isinstance(table, Replace)
    assert table.follows_tie
    assert (adapter.config.vocab_size, adapter.config.tied, adapter.config.targets) == (9, None, ATTENTION)
    assert list(adapter.tokenizer) == ["tokenizer.json"]
    assert (adapter.notes, dict(adapter.unclaimed)) == ((), {})


@pytest.mark.parametrize("hints", [Hints(alpha=8), Hints(scale=2.0), Hints(alpha=8, scale=2.0), Hints(alpha=8, rank=4)])
def test_a_hint_fills_the_missing_alpha(hints: Hints) -> None:
    adapter = native.read(bundle(hand_written()), hints=hints)
    assert adapter.updates["blocks.1.attention.v_proj.weight"][0].scale == 2.0


@pytest.mark.parametrize(
    ("config", "hints"),
    [
        ({"alpha": 16}, Hints(alpha=8)),
        ({"alpha": 16}, Hints(scale=2.0)),
        ({}, Hints(alpha=8, scale=1.0)),
        ({}, Hints(rank=8)),
        ({"fan_in_fan_out": False}, Hints(fan_in_fan_out=True)),
    ],
)
def test_a_hint_never_contradicts(config: dict[str, Any], hints: Hints) -> None:
    with pytest.raises(AssumptionContradicted, match="was given"):
        native.read(bundle(hand_written(**config)), hints=hints)


def test_hand_written_to_peft_and_back_gives_the_very_tensors() -> None:
    source = hand_written()
    as_peft = peft.write(native.read(bundle(source), hints=Hints(alpha=8)))
    result = loaded(native.write(peft.read(bundle(loaded(as_peft))), WriteOptions(container="torch")))
    for name in ("lora_weights.pt", "embedding_weights.pt"):
        assert result[name].keys() == source[name].keys()
        assert all(torch.equal(result[name][key], value) for key, value in source[name].items())
    config = result["lora_config.json"]
    assert {name: config[name] for name in ("format_version", "method", "rank", "alpha", "vocab_size")} == {
        "format_version": 1,
        "method": "lora",
        "rank": 4,
        "alpha": 8,
        "vocab_size": 9,
    }
    assert config["target_modules"] == sorted(ATTENTION)
    assert result["tokenizer.json"] == bundle(source).files["tokenizer.json"].read()


def test_unknown_fields_and_other_files_are_kept() -> None:
    source = hand_written(alpha=8, author="me", seed=[1, 2])
    source |= {"README.md": b"# read me", "merges.txt": b"a b", "optimizer.pt": {}, "notes.pkl": b"", ".hidden": b""}
    adapter = native.read(bundle(source))
    assert [note.code for note in adapter.notes] == ["LF222"]
    assert "optimizer.pt" in adapter.notes[0].message
    result = loaded(native.write(adapter))
    assert result["lora_config.json"]["seed"] == [1, 2]
    assert result["lora_config.json"]["author"] == "me"
    assert result["README.md"] == b"# read me"
    assert result["merges.txt"] == b"a b"
    assert sorted(result) == [
        *("README.md", "embedding_weights.safetensors", "lora_config.json", "lora_weights.safetensors"),
        *("merges.txt", "tokenizer.json"),
    ]


def test_ranks_and_alphas_that_differ_become_exceptions() -> None:
    updates = {
        "a.x.weight": (LowRank(lazy(3, 2), lazy(2, 3), 2.0),),
        "a.y.weight": (LowRank(lazy(3, 2), lazy(2, 3), 2.0),),
        "b.x.weight": (LowRank(lazy(3, 4), lazy(4, 3), 0.3),),
    }
    config = loaded(native.write(Adapter(config=AdapterConfig(), updates=updates)))["lora_config.json"]
    assert (config["rank"], config["alpha"]) == (2, 4)
    assert config["rank_exceptions"] == {"b.x": 4}
    assert config["alpha_exceptions"] == {"b.x": 1.2}


def test_rows_that_follow_one_another_are_stated_by_the_first() -> None:
    updates = {
        "e.weight": (Rows((7, 8, 9), lazy(3, 2)),),
        "f.weight": (Rows((9, 7), lazy(2, 2)),),
        "q.weight": (LowRank(lazy(3, 2), lazy(2, 3), 2.0),),
    }
    written = native.write(Adapter(config=AdapterConfig(tied=(("e.weight", "h.weight"),)), updates=updates))
    assert loaded(written)["lora_config.json"]["rows"] == {"e.weight": 7, "f.weight": [9, 7]}
    assert native.read(written).config.tied == (("e.weight", "h.weight"),)


def test_what_cannot_be_held_is_refused_before_writing() -> None:
    layer = LowRank(lazy(3, 2), lazy(2, 3), 2.0)
    loha = Hadamard(lazy(3, 2), lazy(2, 3), lazy(3, 2), lazy(2, 3), 1.0)
    updates = {
        "a.weight": (layer, layer),
        "b.weight": (loha,),
        "c.weight": (replace(layer, scale=None),),
        "d.in_proj_weight": (layer,),
        f"{'e' * 1100}.weight": (layer,),
    }
    found = list(native.losses(Adapter(config=AdapterConfig(), updates=updates, unclaimed={"x": lazy(1)})))
    assert [(each.code, each.where[:3]) for each in found] == [
        ("LF702", "a.w"),
        ("LF702", "b.w"),
        ("LF702", "d.i"),
        ("LF702", "eee"),
        ("LF705", ""),
        ("LF706", ""),
    ]


def test_a_folder_of_a_later_version_says_so() -> None:
    with pytest.raises(FormatError, match=r"format_version 2 is unknown.*update loraformat"):
        native.read(bundle(hand_written(format_version=2)))


def test_a_lone_file_is_not_a_folder() -> None:
    assert native.sniff(bundle({"lora_weights.pt": {}}, single=True)) is None


def test_what_is_said_of_the_training_is_kept_from_every_format() -> None:
    said = {"loraplus_lr_ratio": 16.0, "tokenizer_sha256": "0a" * 32, "provenance": {"made": {"by": "me"}}}
    module = "base_model.model.m.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(4, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.1, **said}
    adapter = peft.read(bundle({"adapter_config.json": config, "adapter_model.safetensors": factors}))
    (lost,) = native.losses(adapter)
    assert "lora_dropout" in lost.message
    assert not any(name in lost.message for name in said)
    written = loaded(native.write(adapter))
    again = loaded(native.write(native.read(bundle(written))))
    for files in (written, again):
        assert {name: files["lora_config.json"][name] for name in said} == said
