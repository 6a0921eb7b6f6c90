"""adapter_config.json, field by field: what is read, and which values are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from loraformat.errors import AssumptionContradicted, ConfigError, UnsupportedUpdate
from loraformat.formats.kit.base import Hints
from loraformat.formats.peft.config.fields import PeftConfig, parse
from loraformat.formats.peft.tuners import REFUSED


def config(hints: Hints | None = None, peft_type: Any = "LORA", **fields: Any) -> PeftConfig:
    return parse({"peft_type": peft_type, "r": 4, **fields}, hints or Hints())


def test_what_a_bare_config_says() -> None:
    found = config()
    assert (found.rank, found.alpha, found.scaling.by_root, found.is_dora) == (4, None, False, False)
    assert (found.targets, found.modules_to_save, found.parameters, found.token_indices) == (None, (), (), None)
    assert (found.bias, found.ensures_tying, found.fan_in_fan_out, found.version) == ("none", False, None, None)
    assert (found.layers, found.recipe, found.blocks, found.enabled) == (None, None, None, None)


def test_each_field_is_taken_from_its_own_name() -> None:
    found = config(
        lora_alpha=8,
        use_rslora=True,
        use_dora=True,
        target_modules=["q", "v"],
        target_parameters=["e.w"],
        modules_to_save=["n"],
        trainable_token_indices=[3, 1],
        bias="all",
        ensure_weight_tying=True,
        fan_in_fan_out=True,
        peft_version="0.19.0",
        layer_replication=[[0, 2]],
        init_lora_weights="PiSSA",
        enable_lora=[True, False],
    )
    assert (found.rank, found.alpha, found.scaling.by_root, found.is_dora) == (4, 8, True, True)
    assert (found.targets, found.modules_to_save, found.parameters) == (("q", "v"), ("n",), ("e.w",))
    assert (found.token_indices, found.bias, found.ensures_tying) == ((3, 1), "all", True)
    assert (found.fan_in_fan_out, found.version, found.layers) == (True, "0.19.0", (0, 1))
    assert (found.recipe, found.enabled) == ("pissa", (True, False))


@pytest.mark.parametrize(("peft_type", "name"), [("LORA", "lora_alpha"), ("LOHA", "alpha"), ("LOKR", "alpha")])
def test_alpha_has_another_name_in_loha_and_lokr(peft_type: str, name: str) -> None:
    other = "alpha" if name == "lora_alpha" else "lora_alpha"
    assert config(peft_type=peft_type, **{name: 8, other: 3}).alpha == 8
    assert config(peft_type=peft_type, **{other: 3}).alpha is None


def test_patterns_give_some_modules_a_rank_and_an_alpha_of_their_own() -> None:
    found = config(lora_alpha=8, rank_pattern={"q": 2}, alpha_pattern={"a.k": 3})
    assert [found.rank_of(name) for name in ("a.q", "a.k", "b.k", "xq")] == [2, 4, 4, 4]
    assert [found.alpha_of(name) for name in ("a.q", "a.k", "b.k")] == [8, 3, 8]


def test_tokens_are_one_list_or_lists_by_module() -> None:
    assert config().indices_of("m.embed") is None
    assert config(trainable_token_indices=[5, 2]).indices_of("m.embed") == (5, 2)
    found = config(trainable_token_indices={"embed": [5], "m.head": [0, 2**31 - 1]})
    assert found.indices_of("m.embed") == (5,)
    assert found.indices_of("m.head") == (0, 2**31 - 1)
    assert found.indices_of("x.head") is None


def test_modules_that_peft_adds_for_a_task_are_not_required() -> None:
    found = config(modules_to_save=["classifier", "score", "qa_outputs", "norm"])
    assert found.required_modules() == ("norm",)
    assert found.modules_to_save == ("classifier", "score", "qa_outputs", "norm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r"),
        ({"r": 65_537}, "r"),
        ({"r": 2.5}, "r"),
        ({"r": True}, "r"),
        ({"r": None}, "rank is missing"),
        ({"rank_pattern": {"q": 0}}, r'rank_pattern\["q"\]'),
        ({"rank_pattern": {"q": 65_537}}, r'rank_pattern\["q"\]'),
        ({"rank_pattern": []}, "rank_pattern"),
        ({"alpha_pattern": {"q": "8"}}, r'alpha_pattern\["q"\]'),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"fan_in_fan_out": 0}, "fan_in_fan_out"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying"),
        ({"peft_version": 0.18}, "peft_version"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": ["q", 3]}, "target_modules"),
        ({"target_parameters": "q"}, "target_parameters"),
        ({"modules_to_save": [1]}, "modules_to_save"),
        ({"bias": "some"}, "bias"),
        ({"bias": None}, "bias"),
        ({"bias": "boft_only"}, "bias"),
        ({"enable_lora": True}, "enable_lora"),
        ({"enable_lora": [True, 1]}, "enable_lora"),
        ({"trainable_token_indices": 3}, "trainable_token_indices"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices\[0\]"),
        ({"trainable_token_indices": [0, 2**31]}, r"trainable_token_indices\[1\]"),
        ({"trainable_token_indices": [3, 3]}, "occurs twice"),
        ({"trainable_token_indices": {"e": [3, 3]}}, r'trainable_token_indices\["e"\].*occurs twice'),
        ({"trainable_token_indices": {"e": 3}}, "list of token numbers"),
        ({"peft_type": None}, "peft_type.*missing"),
        ({"peft_type": 3}, "peft_type"),
        ({"use_bdlora": 3}, "use_bdlora"),
        ({"use_bdlora": {"nblocks": 65_537}}, "use_bdlora"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication"),
    ],
)
def test_a_value_of_another_type_or_size_is_refused_by_the_name_of_its_field(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1},
        {"r": 65_536},
        {"rank_pattern": {"q": 65_536}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"bias": "lora_only"},
        {"peft_type": "BOFT", "bias": "boft_only"},
        {"use_bdlora": {"nblocks": 65_536}},
        {"use_bdlora": False},
        {"modules_to_save": None, "target_parameters": None},
        {"trainable_token_indices": []},
        {"layer_replication": [[0, 10_000]]},
    ],
)
def test_values_at_the_edge_of_what_is_allowed_are_read(fields: dict[str, Any]) -> None:
    config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "randomized"),
        ({"init_lora_weights": "PISSA_NITER_16"}, "randomized"),
        ({"init_lora_weights": "corda"}, "by data"),
        ({"init_lora_weights": "loftq"}, "quantization"),
        ({"init_lora_weights": "lora_ga"}, "gradients"),
        ({"peft_type": "OF_THE_FUTURE"}, "OF_THE_FUTURE are not supported$"),
        *(({"peft_type": name}, f"{name} are not supported: ") for name in REFUSED),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedUpdate, match=message):
        config(**fields)


@pytest.mark.parametrize("value", [None, False, [], {}])
@pytest.mark.parametrize("name", ["alora_invocation_tokens", "arrow_config", "use_qalora"])
def test_a_field_that_says_nothing_is_not_refused(name: str, value: Any) -> None:
    config(**{name: value})


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_an_initialization_that_leaves_the_base_alone_is_no_recipe(init: Any) -> None:
    assert config(init_lora_weights=init).recipe is None


def test_the_caller_may_give_the_rank_and_must_not_contradict_it() -> None:
    assert config(Hints(rank=4), r=None).rank == 4
    assert config(Hints(rank=4)).rank == 4
    with pytest.raises(AssumptionContradicted, match="rank"):
        config(Hints(rank=5))


def test_other_tuners_need_no_rank_of_lora() -> None:
    found = config(peft_type="TRAINABLE_TOKENS", r=None, token_indices=[3], trainable_token_indices=[9])
    assert found.token_indices == (3,)
