"""Which weights of a base are one table under several names."""

from __future__ import annotations

from typing import Any

import pytest

from loraformat.matching.ties import Tie, is_embedding, is_vocabulary, tie_claim, ties_of
from loraformat.model.checkpoint import Checkpoint, StoredTensor
from loraformat.model.tensors import DType, Span

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"]}
MINE = {"architectures": ["MineForCausalLM"]}


def base(*names: str, config: dict[str, Any], shape: tuple[int, int] = (9, 4)) -> Checkpoint:
    tensors = {name: StoredTensor("f", DType.F32, shape, Span(0, 0)) for name in names}
    return Checkpoint("base", {}, tensors, config=config)


@pytest.mark.parametrize("config", [LLAMA, MINE])
def test_a_head_that_is_not_stored_is_the_embedding(config: dict[str, Any]) -> None:
    assert ties_of(base(EMBED, config=config)) == (Tie((EMBED, HEAD), EMBED),)
    assert ties_of(base(EMBED, config={**config, "tie_word_embeddings": False})) == ()
    assert ties_of(base(EMBED, config={**config, "tie_word_embeddings": True})) == (Tie((EMBED, HEAD), EMBED),)


def test_a_base_without_config_ties_nothing() -> None:
    assert ties_of(base(EMBED, config={}), [HEAD]) == ()


def test_the_table_may_be_stored_under_the_name_of_the_head() -> None:
    assert ties_of(base(HEAD, config=LLAMA)) == (Tie((EMBED, HEAD), HEAD),)


@pytest.mark.parametrize(
    ("config", "wanted", "head"),
    [
        (MINE, ["tied.output.weight"], "tied.output.weight"),
        (MINE, ["tied.other.weight"], "lm_head.weight"),
        ({"architectures": ["Mine"]}, [], None),
        ({"architectures": ["Mine"]}, ["x.lm_head.weight"], "x.lm_head.weight"),
        ({"architectures": ["MineLMHeadModel"]}, [], "lm_head.weight"),
        ({"architectures": ["MineForConditionalGeneration"]}, [], "lm_head.weight"),
        ({**MINE, "model_type": "gpt_neox"}, [], "embed_out.weight"),
    ],
)
def test_the_head_of_a_class_that_the_table_does_not_know(
    config: dict[str, Any], wanted: list[str], head: str | None
) -> None:
    assert ties_of(base("my.wte.weight", config=config), wanted) == (
        () if head is None else (Tie(("my.wte.weight", head), "my.wte.weight"),)
    )


def test_a_head_below_the_language_model_of_a_composed_one() -> None:
    nested = "language_model.model.embed_tokens.weight"
    tie = Tie((nested, "language_model.lm_head.weight"), nested)
    assert ties_of(base(nested, config=MINE)) == (tie,)
    assert ties_of(base(nested, config=MINE), [HEAD]) == (tie,)


def test_a_stored_head_is_tied_where_the_config_says_so_and_it_is_as_large() -> None:
    names = ("my.wte.weight", "my.output.weight")
    config = {"architectures": ["Mine"], "tie_word_embeddings": True}
    assert ties_of(base(*names, config=config)) == (Tie(names, names[0]),)
    assert ties_of(base(*names, config={"architectures": ["Mine"]})) == ()
    other = base(*names, config=config)
    sizes = {**other.tensors, names[1]: StoredTensor("f", DType.F32, (8, 4), Span(0, 0))}
    assert ties_of(Checkpoint("base", {}, sizes, config=config)) == ()
    assert ties_of(base(*names, "my.head.weight", config=config)) == ()  # which of the two?


def test_of_two_embeddings_none_is_tied() -> None:
    assert ties_of(base("a.wte.weight", "b.wte.weight", config=MINE), [HEAD]) == ()


def test_names_of_one_storage_are_one_table_whatever_the_config_says() -> None:
    def stored(storage: str | None, shape: tuple[int, int] = (9, 4), file: str = "f") -> StoredTensor:
        return StoredTensor(file, DType.F32, shape, Span(0, 0), storage=storage)

    tensors = {"lm_head.weight": stored("s"), "transformer.wte.weight": stored("s"), "x.weight": stored("t")}
    tie = Tie(("transformer.wte.weight", "lm_head.weight"), "transformer.wte.weight")
    for config in ({}, {"tie_word_embeddings": False}, LLAMA):
        assert ties_of(Checkpoint("base", {}, tensors, config=config)) == (tie,)
    for other in (stored("s", (4, 9)), stored("s", file="g"), stored(None)):
        apart = {"lm_head.weight": stored("s"), "transformer.wte.weight": other}
        assert ties_of(Checkpoint("base", {}, apart)) == ()


@pytest.mark.parametrize(
    ("config", "claim"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"weight_tying": True}, True),
        ({"weight_tying": False}, False),
        ({"tie_word_embeddings": None}, None),
        ({"tie_word_embeddings": 0}, None),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_what_a_config_says(config: dict[str, Any], claim: bool | None) -> None:
    assert tie_claim(config) is claim


def test_names_of_tables() -> None:
    for name in (EMBED, "transformer.wte.weight", "shared.weight", "gpt_neox.embed_in.weight", "wte.weight"):
        assert is_embedding(name)
        assert is_vocabulary(name)
    for name in (HEAD, "embed_out.weight", "output.weight", "proj_out.weight"):
        assert not is_embedding(name)
        assert is_vocabulary(name)
    for name in ("model.embed_tokens.bias", "model.embed_tokens", "model.q_proj.weight", "lm_head.bias", "weight"):
        assert not is_embedding(name)
        assert not is_vocabulary(name)
