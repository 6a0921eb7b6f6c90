"""Where updates land: names, orientation and ties, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from loraformat.matching import match, nearest, ties_of
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.checkpoint import Checkpoint, StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.model.updates import LowRank, Magnitude, Replace, Update


def base(shapes: Mapping[str, tuple[int, ...]], **config: object) -> Checkpoint:
    tensors = {name: StoredTensor("f", DType.F32, shape, Span(0, 0)) for name, shape in shapes.items()}
    return Checkpoint("base", {}, tensors, config=config)


def adapter(updates: Mapping[str, Update], **config: object) -> Adapter:
    return Adapter(config=AdapterConfig(**config), updates={name: (update,) for name, update in updates.items()})


def low_rank(rows: int, cols: int, **fields: object) -> LowRank:
    return LowRank(LazyTensor.of(torch.zeros(rows, 2)), LazyTensor.of(torch.zeros(2, cols)), 1.0, **fields)


def test_exact_names_land() -> None:
    found = match(adapter({"a.q.weight": low_rank(4, 6)}), base({"a.q.weight": (4, 6)}))
    assert (found.landings["a.q.weight"][0].tensor, found.unmatched, found.misfits) == ("a.q.weight", {}, ())


@pytest.mark.parametrize(
    ("prefix", "names"), [("model.", ("a.q.weight", "a.k.weight")), ("", ("x.a.q.weight", "x.a.k.weight"))]
)
def test_one_prefix_that_serves_all_names_is_added_or_removed(prefix: str, names: tuple[str, str]) -> None:
    stored = base(
        {"model.a.q.weight": (4, 6), "model.a.k.weight": (4, 6)}
        if prefix
        else {"a.q.weight": (4, 6), "a.k.weight": (4, 6)}
    )
    found = match(adapter(dict.fromkeys(names, low_rank(4, 6))), stored)
    assert {landing.tensor for (landing,) in found.landings.values()} == set(stored.tensors)


def test_a_prefix_that_serves_only_some_names_is_no_prefix() -> None:
    stored = base({"model.a.q.weight": (4, 6), "other.a.k.weight": (4, 6)})
    found = match(adapter({"a.q.weight": low_rank(4, 6), "a.k.weight": low_rank(4, 6)}), stored)
    assert set(found.unmatched) == {"a.q.weight", "a.k.weight"}


def test_two_prefixes_that_both_serve_are_refused() -> None:
    stored = base({"enc.a.q.weight": (4, 6), "dec.a.q.weight": (4, 6)})
    assert match(adapter({"a.q.weight": low_rank(4, 6)}), stored).landings == {}


UNKNOWN = {"model.enc.0.q.weight": (4, 6), "model.enc.1.q.weight": (4, 6), "model.enc.0.out.weight": (6, 4)}
EXCHANGED = {"net.encoder.0.q.weight": low_rank(4, 6), "net.encoder.1.q.weight": low_rank(4, 6)}


def test_one_prefix_is_exchanged_for_another_in_a_base_whose_class_nobody_knows() -> None:
    found = match(adapter(EXCHANGED), base(UNKNOWN, architectures=["Mine"], model_type="mine"))
    assert {name: landing.tensor for name, (landing,) in found.landings.items()} == {
        "net.encoder.0.q.weight": "model.enc.0.q.weight",
        "net.encoder.1.q.weight": "model.enc.1.q.weight",
    }
    assert all(landing.is_prefixed for (landing,) in found.landings.values())


@pytest.mark.parametrize(
    ("stored", "config"),
    [
        (UNKNOWN, {"architectures": ["LlamaForCausalLM"]}),  # a known class has its own names
        (UNKNOWN | {"aux.encoder.enc.0.q.weight": (4, 6), "aux.encoder.enc.1.q.weight": (4, 6)}, {}),  # two homes
        (dict.fromkeys(UNKNOWN, (4, 7)), {}),  # no home of that shape
        ({"model.enc.0.q.weight": (4, 6), "model.enc.2.q.weight": (4, 6)}, {}),  # another layer
        ({"model.enc.0.q.weight": (4, 6), "other.enc.1.q.weight": (4, 6)}, {}),  # no one prefix
    ],
)
def test_a_prefix_is_not_exchanged_where_that_would_be_a_guess(stored: dict, config: dict) -> None:
    found = match(adapter(EXCHANGED), base(stored, **config))
    assert (found.landings, set(found.unmatched)) == ({}, set(EXCHANGED))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("net.0.q.weight", {"model.5.q.weight": (4, 6)}),
        ("block1.attn.q.weight", {"block2.attn.q.weight": (4, 6)}),
        ("net.layer_1.q.weight", {"net.layer_2.q.weight": (4, 6)}),
        ("model.decoder.layers.0.fc.weight", {"model.encoder.layers.0.fc.weight": (4, 6)}),
        ("net.up_blocks.0.attn.q.weight", {"net.down_blocks.0.attn.q.weight": (4, 6)}),
        ("model.language_model.layers.0.q.weight", {"vision_tower.layers.0.q.weight": (4, 6)}),
        ("net.0.attn.q.weight", {"net.0.attn.qkv.weight": (12, 6), "net.0.other.q.weight": (4, 6)}),
        ("net.0.q.weight", {"model.0.q.weight": (6, 4)}),
    ],
)
def test_no_layer_and_no_part_becomes_another(name: str, stored: dict) -> None:
    assert match(adapter({name: low_rank(4, 6)}), base(stored)).landings == {}


def test_of_two_homes_the_one_of_the_right_shape_is_taken() -> None:
    stored = UNKNOWN | {"model.dec.0.q.weight": (4, 9), "model.dec.1.q.weight": (4, 9)}
    found = match(adapter(EXCHANGED), base(stored))
    assert {landing.tensor for (landing,) in found.landings.values()} == {
        "model.enc.0.q.weight",
        "model.enc.1.q.weight",
    }


def test_nearest_names_share_the_tail_first() -> None:
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert nearest("model.layers.9.self_attn.q_proj.weight", names)[0] == names[0]
    assert nearest("zzz", names) == ()


def test_a_wrong_base_of_many_names_is_told_at_once() -> None:
    """Each name against each other took minutes; what hangs runs into the time limit of the suite."""
    layers = range(20_000)
    names = {f"model.layers.{layer}.self_attn.q_proj.weight": (4, 4) for layer in layers}
    stored = {f"transformer.h.{layer}.attn.q_attn.weight": (4, 4) for layer in layers}
    found = match(adapter(names), base(stored))
    assert len(found.unmatched) == 20_000
    assert found.unmatched["model.layers.7.self_attn.q_proj.weight"] == ("transformer.h.7.attn.q_attn.weight",)


def test_the_nearest_name_of_the_same_layer_comes_first() -> None:
    stored = [f"transformer.h.{layer}.self_attn.{kind}_proj.weight" for layer in range(100) for kind in "qkv"]
    assert nearest("model.layers.41.self_attn.k_proj.weight", stored)[0] == "transformer.h.41.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("config", "flag", "shape", "expected"),
    [
        ({"model_type": "gpt2"}, False, (6, 4), True),  # Conv1D by architecture, whatever the flag says
        ({"model_type": "llama"}, False, (6, 4), None),  # a transposed Llama is damaged
        ({"model_type": "mine"}, True, (6, 4), True),
        ({}, None, (6, 4), True),  # nothing known: the shape decides
        ({}, True, (4, 6), False),
    ],
)
def test_who_decides_the_orientation(config: dict, flag: bool | None, shape: tuple, expected: bool | None) -> None:
    name = "h.0.attn.c_attn.weight"
    found = match(adapter({name: low_rank(4, 6)}, fan_in_fan_out=flag), base({name: shape}, **config))
    if expected is None:
        assert [misfit.weight for misfit in found.misfits] == [name]
    else:
        assert (found.landings[name][0].transposed, found.misfits) == (expected, ())


@pytest.mark.parametrize(
    ("config", "flag", "transposed", "is_guess"),
    [
        ({"model_type": "gpt2"}, False, True, False),
        ({"model_type": "llama"}, True, False, False),
        ({}, True, True, True),
        ({}, None, False, False),
    ],
)
def test_a_square_weight_is_transposed_by_architecture_or_by_a_marked_guess(
    config: dict, flag: bool | None, transposed: bool, is_guess: bool
) -> None:
    name = "h.0.attn.c_proj.weight"
    found = match(adapter({name: low_rank(4, 4)}, fan_in_fan_out=flag), base({name: (4, 4)}, **config))
    assert (found.landings[name][0].transposed, found.landings[name][0].is_guess) == (transposed, is_guess)


def test_misfits_are_found_in_factors_magnitudes_and_replacements() -> None:
    short = Magnitude(LazyTensor.of(torch.zeros(3)))
    updates = {
        "a.weight": low_rank(4, 7),
        "b.weight": low_rank(4, 6, magnitude=short),
        "c.weight": Replace(LazyTensor.of(torch.zeros(9, 5))),
        "d.weight": Replace(LazyTensor.of(torch.zeros(9, 6))),
    }
    found = match(adapter(updates), base(dict.fromkeys(updates, (4, 6)), model_type="llama"))
    assert [misfit.weight for misfit in found.misfits] == ["a.weight", "b.weight", "c.weight"]


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("shapes", "config", "wanted", "expected"),
    [
        ({EMBED: (9, 4)}, {"tie_word_embeddings": True}, [HEAD], [(EMBED, HEAD)]),
        ({EMBED: (9, 4)}, {"tie_word_embeddings": False}, [HEAD], []),
        ({EMBED: (9, 4)}, {"text_config": {"tie_word_embeddings": False}}, [HEAD], []),
        ({EMBED: (9, 4)}, {}, [HEAD], []),  # no config.json: nothing says that there is a head
        ({EMBED: (9, 4)}, {"architectures": ["LlamaForCausalLM"]}, [], [(EMBED, HEAD)]),
        ({EMBED: (9, 4)}, {"architectures": ["LlamaModel"], "tie_word_embeddings": True}, [], []),
        ({EMBED: (9, 4), HEAD: (9, 4)}, {"tie_word_embeddings": True}, [], [(EMBED, HEAD)]),
        ({EMBED: (9, 4), HEAD: (9, 4)}, {"model_type": "opt"}, [], []),
    ],
)
def test_which_names_are_one_table(shapes: dict, config: dict, wanted: list, expected: list) -> None:
    assert [tie.names for tie in ties_of(base(shapes, **config), wanted)] == expected
