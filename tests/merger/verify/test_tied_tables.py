"""Which names of a base the second opinion takes for one table, and when they part: answers known by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from merger.checkpoints import low_rank

from loraformat.merger.verify.reference.ties import Table, follows, joined, stays_one, tables_of
from loraformat.model.checkpoint import StoredTensor
from loraformat.model.tensors import DType, LazyTensor, Span
from loraformat.model.updates import Dense, Replace, Rows, Update

EMBED, HEAD, PROJECTION = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"]}
NOBODY = {"architectures": ["SomebodysForCausalLM"]}


def stored(*names: str, **changed: tuple[int, ...]) -> dict[str, StoredTensor]:
    shapes = dict.fromkeys(names, (9, 4))
    return {
        name: StoredTensor("model.safetensors", DType.F32, (*shape,), Span(0, 4 * math.prod(shape)))
        for name, shape in {**shapes, **changed}.items()
    }


def tables(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], *wanted: str) -> list[Table]:
    return tables_of(tensors, config, wanted)


def in_one_storage(tensors: Mapping[str, StoredTensor], **changed: Any) -> dict[str, StoredTensor]:
    """The tensors as names of one storage, with the last of them changed."""
    shared = {name: replace(tensor, storage="0") for name, tensor in tensors.items()}
    last = list(shared)[-1]
    return {**shared, last: replace(shared[last], **changed)}


def test_names_of_one_storage_are_one_table_that_its_embedding_stands_for() -> None:
    expected = [Table((EMBED, HEAD), EMBED)]
    for names in ((EMBED, HEAD), (HEAD, EMBED)):
        for config in ({}, {"tie_word_embeddings": False}, LLAMA, {"tie_word_embeddings": True}):
            assert tables(in_one_storage(stored(*names)), config) == expected
    assert tables(in_one_storage(stored("b.weight", "a.weight")), {}) == [Table(("b.weight", "a.weight"), "b.weight")]


@pytest.mark.parametrize(
    "changed",
    [
        {"storage": None},
        {"storage": "1"},
        {"file": "other.bin"},
        {"offset": 4},
        {"shape": (4, 9)},
        {"strides": (1, 9)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_names_of_other_bytes_are_no_table(changed: dict[str, Any]) -> None:
    assert tables(in_one_storage(stored(EMBED, HEAD), **changed), {}) == []


def test_one_name_is_no_table() -> None:
    assert tables(in_one_storage(stored(EMBED)), {}) == []
    assert tables(stored(EMBED, HEAD), {}) == []


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": False},
        {"weight_tying": False},
        {"text_config": {"tie_word_embeddings": False}},
        {"tie_word_embeddings": False, "text_config": {"weight_tying": False}},
    ],
)
def test_a_config_that_denies_it_ties_nothing(config: dict[str, Any]) -> None:
    assert tables(stored(EMBED), {**LLAMA, **config}, HEAD) == []
    assert tables(stored(EMBED), config, HEAD) == []


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None},
        {"text_config": {"tie_word_embeddings": True}},
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
        {"text_config": None},
        {},
    ],
)
def test_a_class_ties_what_it_declares(config: dict[str, Any]) -> None:
    settings = {**LLAMA, **config}
    assert tables(stored(EMBED, PROJECTION), settings) == [Table((EMBED, HEAD), EMBED)]
    assert tables(stored(HEAD, PROJECTION), settings) == [Table((EMBED, HEAD), HEAD)]
    assert tables(stored(HEAD, EMBED), settings) == [Table((EMBED, HEAD), EMBED)]


def test_a_class_with_several_ties_has_several_tables() -> None:
    words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    biases = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    config = {"architectures": ["BertForMaskedLM"]}
    found = tables(stored(words, *biases[:1]), config)
    assert found == [Table((words, head), words), Table(biases, biases[0])]
    assert tables(stored(words), config) == found[:1]


def test_a_class_that_declares_no_tie_has_none() -> None:
    words = "bert.embeddings.word_embeddings.weight"
    config = {"architectures": ["BertForSequenceClassification"], "tie_word_embeddings": True}
    assert tables(stored(words), config, HEAD) == []


def test_a_table_of_one_storage_is_not_told_twice() -> None:
    shared = in_one_storage(stored(EMBED, "x.weight"))
    assert tables(shared, LLAMA) == [Table((EMBED, "x.weight"), EMBED)]
    assert tables(in_one_storage(stored("x.weight", "y.weight")) | stored(EMBED), LLAMA) == [
        Table(("x.weight", "y.weight"), "x.weight"),
        Table((EMBED, HEAD), EMBED),
    ]


def test_names_that_the_class_does_not_have_are_tied_as_those_of_a_class_that_nobody_knows() -> None:
    assert tables(stored("tok_embeddings.weight"), LLAMA) == [
        Table(("tok_embeddings.weight", HEAD), "tok_embeddings.weight")
    ]


@pytest.mark.parametrize(
    ("tensors", "config", "wanted", "heads"),
    [
        (stored(EMBED), {"x": 1}, (), ()),
        (stored(EMBED), {"x": 1}, (HEAD,), (HEAD,)),
        (stored(EMBED), {"x": 1}, (PROJECTION, "lm_head.bias"), ()),
        (stored(EMBED), {"x": 1}, ("b.head.weight", "a.output.weight"), ("a.output.weight", "b.head.weight")),
        (stored(EMBED, HEAD), {"x": 1}, (HEAD,), ()),
        (stored(EMBED, HEAD), {"tie_word_embeddings": True}, (), (HEAD,)),
        (stored(EMBED, HEAD), {"weight_tying": True}, (), (HEAD,)),
        (stored(EMBED, "output.weight"), {"text_config": {"tie_word_embeddings": True}}, (), ("output.weight",)),
        (stored(EMBED, **{HEAD: (8, 4)}), {"tie_word_embeddings": True}, (), ()),
        (stored(EMBED, **{HEAD: (10, 4)}), {"tie_word_embeddings": True}, (), ()),
        (stored(EMBED, HEAD, "output.weight"), {"tie_word_embeddings": True}, (), ()),
        (stored(EMBED, HEAD), {"tie_word_embeddings": True}, ("x.output.weight",), (HEAD, "x.output.weight")),
        (stored(EMBED), {"tie_word_embeddings": True}, (), ()),
        (stored(EMBED), NOBODY, (), (HEAD,)),
        (stored(EMBED), {**NOBODY, "tie_word_embeddings": True}, (), (HEAD,)),
        (stored(EMBED), NOBODY, ("output.weight",), ("output.weight",)),
        (stored(EMBED), {"architectures": ["SomebodysLMHeadModel"]}, (), (HEAD,)),
        (stored(EMBED), {"architectures": ["SomebodysForConditionalGeneration"]}, (), (HEAD,)),
        (stored(EMBED), {"architectures": ["SomebodysForMaskedLM"]}, (), ()),
        (stored(EMBED), {"architectures": ["SomebodysModel"]}, (), ()),
        (stored(EMBED), {**NOBODY, "model_type": "gpt_neox"}, (), ("embed_out.weight",)),
        (stored(EMBED, "wte.weight"), NOBODY, (HEAD,), ()),
        (stored(PROJECTION), NOBODY, (HEAD,), ()),
        (
            stored("model.embed_tokens.bias", "model.embed_tokens", "model.embed_tokens.weight_scale"),
            NOBODY,
            (HEAD,),
            (),
        ),
    ],
)
def test_the_heads_of_a_class_that_nobody_knows(
    tensors: dict[str, StoredTensor], config: dict[str, Any], wanted: Sequence[str], heads: Sequence[str]
) -> None:
    assert tables(tensors, config, *wanted) == ([Table((EMBED, *heads), EMBED)] if heads else [])


@pytest.mark.parametrize(
    "layer", ["embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "token_embedding"]
)
def test_names_of_embeddings(layer: str) -> None:
    assert tables(stored(f"x.{layer}.weight"), NOBODY) == [Table((f"x.{layer}.weight", HEAD), f"x.{layer}.weight")]
    assert tables(stored(f"{layer}.weight"), NOBODY) == [Table((f"{layer}.weight", HEAD), f"{layer}.weight")]


@pytest.mark.parametrize(
    "layer",
    [
        *("lm_head", "embed_out", "output", "output_layer", "head", "decoder", "generator_lm_head", "proj_out"),
    ],
)
def test_names_of_heads(layer: str) -> None:
    head = f"x.{layer}.weight"
    assert tables(stored(EMBED), {"x": 1}, head) == [Table((EMBED, head), EMBED)]


def test_the_head_of_a_language_model_inside_of_another_is_inside_of_it_too() -> None:
    nested = "language_model.model.embed_tokens.weight"
    expected = [Table((nested, "language_model.lm_head.weight"), nested)]
    assert tables(stored(nested), {"x": 1}, HEAD) == expected
    assert tables(stored(nested), NOBODY) == expected
    for head in ("head.weight", "output.weight"):
        assert tables(stored(nested), {"x": 1}, head) == [Table((nested, head), nested)]
    other = "language_model.embed_tokens.weight"
    assert tables(stored(other), {"x": 1}, HEAD) == [Table((other, HEAD), other)]


def test_tables_of_several_adapters_are_joined_without_names_of_other_values() -> None:
    told = [Table(("a", "b"), "a"), Table(("x", "y"), "x"), Table(("a", "c", "b"), "a")]
    assert joined(told, lambda _one, _other: True) == [Table(("a", "b", "c"), "a"), Table(("x", "y"), "x")]
    asked = []

    def is_same(one: str, other: str) -> bool:
        asked.append((one, other))
        return other != "b"

    assert joined(told[::2], is_same) == [Table(("a", "c"), "a")]
    assert set(asked) == {("a", "a"), ("a", "b"), ("a", "c")}


def values(rows: int, cols: int = 4, **changed: float) -> LazyTensor:
    """Equal values at every call, but for the row `at`, whose last value is `is_`."""
    found = torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols)
    if changed:
        found[int(changed["at"]), -1] = changed["is_"]
    return LazyTensor.of(found)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (Replace(values(9)), True),
        (Replace(values(9), follows_tie=False), False),
        (Rows((3,), values(1)), True),
        (Rows((3,), values(1), follows_tie=False), False),
        (low_rank(9, 4), False),
        (Dense(values(9)), False),
    ],
)
def test_only_new_values_of_the_table_follow_it(update: Update, expected: bool) -> None:
    assert follows(update) is expected
    assert stays_one([[update]]) is expected


SAME = values(9)


@pytest.mark.parametrize(
    ("chains", "expected"),
    [
        ([[Replace(values(9))], [Replace(values(9))]], True),
        ([[Replace(SAME)], [Replace(SAME)]], True),
        ([[Replace(values(9))], [Replace(values(9, at=8, is_=-1))]], False),
        ([[Replace(values(9))], [Replace(values(9, at=0, is_=-1))]], False),
        ([[Replace(values(9))], [Replace(values(9))], [Replace(values(9, at=3, is_=-1))]], False),
        ([[Replace(values(5000))], [Replace(values(5000))]], True),
        ([[Replace(values(5000))], [Replace(values(5000, at=4999, is_=-1))]], False),
        ([[Replace(values(5000))], [Replace(values(5000, at=4096, is_=-1))]], False),
        ([[Replace(values(5000))], [Replace(values(5000, at=4095, is_=-1))]], False),
        ([[Replace(values(5000))], [Replace(values(5000, at=0, is_=-1))]], False),
        ([[Replace(values(9))], [Replace(values(10))]], False),
        ([[Replace(values(8, 2))], [Replace(values(4, 4))]], False),
        ([[Replace(LazyTensor.of(torch.tensor(1.0)))], [Replace(LazyTensor.of(torch.tensor(1.0)))]], True),
        ([[Replace(LazyTensor.of(torch.tensor(1.0)))], [Replace(LazyTensor.of(torch.tensor(2.0)))]], False),
        ([[Rows((3, 5), values(2))], [Rows((3, 5), values(2))]], True),
        ([[Rows((3, 5), SAME)], [Rows((3, 5), SAME)]], True),
        ([[Rows((3, 5), values(2))], [Rows((3, 6), values(2))]], False),
        ([[Rows((3, 6), values(2))], [Rows((3, 5), values(2))]], False),
        ([[Rows((3, 5), values(2))], [Rows((3, 5), values(2, at=1, is_=-1))]], False),
        ([[Replace(values(9))], [Rows((3,), values(9))]], False),
        ([[Rows((3,), values(9))], [Replace(values(9))]], False),
        ([[Replace(values(9)), Rows((3,), values(1))], [Replace(values(9))]], False),
        ([[Replace(values(9))], [Replace(values(9)), Rows((3,), values(1))]], False),
        ([[Replace(values(9)), Rows((3,), values(1))], [Replace(values(9)), Rows((3,), values(1))]], True),
        ([[Replace(values(9))], [Replace(values(9)), low_rank(9, 4)]], False),
        ([[Replace(values(9))], [Replace(values(9), follows_tie=False)]], False),
    ],
)
def test_names_stay_together_while_all_get_the_same(chains: list[list[Update]], expected: bool) -> None:
    assert stays_one(chains) is expected
