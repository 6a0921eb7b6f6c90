"""The adapter_config.json that a writer makes of the updates, and what PEFT's own code looks up in it."""

from __future__ import annotations

from typing import Any

import pytest
from strategies import lazy

from loraformat.formats.kit.update_slots import all_slots
from loraformat.formats.peft.config.settings import pattern, saved_modules, settings
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows, Update


def pair(rank: int = 2, scale: float = 2.0, magnitude: Magnitude | None = None) -> LowRank:
    return LowRank(lazy(8, rank), lazy(rank, 8), scale, magnitude)


def written(updates: dict[str, Any], *, by_root: bool = True, **config: Any) -> dict[str, Any]:
    chains: dict[str, tuple[Update, ...]] = {
        name: each if isinstance(each, tuple) else (each,) for name, each in sorted(updates.items())
    }
    adapter = Adapter(config=AdapterConfig(**config), updates=chains)
    return settings(adapter, dict(all_slots(adapter)), by_root=by_root)


def test_the_config_of_a_plain_adapter() -> None:
    assert written({"m.q.weight": pair(), "m.v.weight": pair()}) == {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["m.q", "m.v"],
        "task_type": None,
        "use_rslora": False,
    }


def test_what_is_known_of_the_base_is_stated() -> None:
    facts = {"base_model": "a/b", "base_revision": "main", "fan_in_fan_out": True, "task": "CAUSAL_LM"}
    found = written({"m.q.weight": pair()}, **facts)
    assert (found["base_model_name_or_path"], found["revision"]) == ("a/b", "main")
    assert (found["fan_in_fan_out"], found["task_type"]) == (True, "CAUSAL_LM")


def test_free_settings_come_from_a_lora_config_of_peft_alone() -> None:
    raw = {"peft_type": "LORA", "lora_dropout": 0.1, "eva_config": {"rho": 2}, "r": 99, "use_dora": True, "bias": "all"}
    found = written({"m.q.weight": pair()}, raw=raw)
    assert (found["lora_dropout"], found["eva_config"], found["r"], found["bias"]) == (0.1, {"rho": 2}, 2, "none")
    assert "use_dora" not in found
    other = written({"m.q.weight": pair()}, raw={**raw, "peft_type": "VERA"})
    assert (other["lora_dropout"], "eva_config" in other) == (0.0, False)


def test_ranks_and_alphas_that_differ_stand_in_patterns() -> None:
    updates = {"m.a.weight": pair(2, 2.0), "m.b.weight": pair(2, 2.0), "m.c.weight": pair(4, 0.5)}
    found = written(updates)
    assert (found["r"], found["lora_alpha"]) == (2, 4)
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({"m.c": 4}, {"m.c": 2})


def test_a_scale_by_the_root_is_kept_where_it_is_exact_and_may_be_written() -> None:
    raw = {"peft_type": "LORA", "use_rslora": True, "lora_alpha": 8}
    updates = {"m.a.weight": pair(4, 4.0), "m.b.weight": pair(16, 2.0)}
    found = written(updates, raw=raw)
    assert (found["use_rslora"], found["lora_alpha"], found["alpha_pattern"]) == (True, 8, {})
    assert written(updates, raw=raw, by_root=False)["use_rslora"] is False
    assert written(updates, raw={**raw, "use_rslora": False})["use_rslora"] is False
    assert written({**updates, "m.c.weight": pair(4, 3.0)}, raw=raw)["use_rslora"] is False


def test_what_only_some_adapters_have_is_only_then_stated() -> None:
    norm = Magnitude(lazy(8))
    assert written({"m.q.weight": pair(magnitude=norm), "m.v.weight": pair()})["use_dora"] is True
    found = written({"m.q.weight": pair(), "m.q.bias": Dense(lazy(8))})
    assert (found["lora_bias"], "use_dora" in found, "trainable_token_indices" in found) == (True, False, False)


def test_trained_rows_are_one_list_where_the_source_has_one() -> None:
    one = {"m.q.weight": pair(), "m.embed.weight": Rows((3, 1), lazy(2, 8))}
    raw = {"peft_type": "LORA", "trainable_token_indices": [3, 1]}
    assert written(one, raw=raw)["trainable_token_indices"] == [3, 1]
    assert written(one)["trainable_token_indices"] == {"m.embed": [3, 1]}
    two = {**one, "m.head.weight": Rows((5,), lazy(1, 8))}
    assert written(two, raw=raw)["trainable_token_indices"] == {"m.embed": [3, 1], "m.head": [5]}


@pytest.mark.parametrize(
    ("updates", "bias", "saved"),
    [
        ({"m.q.bias": Replace(lazy(8), follows_tie=False)}, "none", ["m.q"]),
        ({"m.q.bias": Replace(lazy(8))}, "all", None),
        ({"m.q.weight": pair(), "m.q.bias": Replace(lazy(8))}, "lora_only", None),
        ({"m.q.weight": pair(), "m.q.bias": Replace(lazy(8), follows_tie=False)}, "lora_only", None),
        ({"m.q.weight": pair(), "m.q.bias": Replace(lazy(8)), "m.n.bias": Replace(lazy(8))}, "all", None),
        ({"m.n.weight": Replace(lazy(8), follows_tie=False)}, "none", ["m.n"]),
        ({"m.n.weight": Replace(lazy(8))}, "none", None),
        ({"m.e.weight": Rows((1,), lazy(1, 8)), "m.e.bias": Replace(lazy(8), follows_tie=False)}, "all", None),
        ({"m.e.weight": Replace(lazy(8, 8)), "m.e.bias": Replace(lazy(8), follows_tie=False)}, "all", None),
    ],
)
def test_biases_and_whole_modules(updates: dict[str, Update], bias: str, saved: list[str] | None) -> None:
    found = written(updates)
    assert (found["bias"], found["modules_to_save"]) == (bias, saved)
    adapter = Adapter(config=AdapterConfig(), updates={name: (each,) for name, each in sorted(updates.items())})
    assert saved_modules(dict(all_slots(adapter))) == (saved or [])


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"m.a": 2, "m.b": 2}, {}),
        ({"m.a": 4, "m.b": 2}, {"m.a": 4}),
        ({"a": 4, "m.a": 2}, {"^a": 4}),  # a plain name would catch the other too
        ({"a": 4, "m.a": 8}, {"^a": 4, r"^m\.a": 8}),
        ({"m.a+b": 4, "m.c": 2}, {r"^m\.a\+b": 4}),
    ],
)
def test_names_in_patterns_are_plain_unless_they_would_catch_others(
    values: dict[str, int], wanted: dict[str, int]
) -> None:
    assert pattern(values, 2) == wanted


def test_patterns_are_looked_up_by_peft_as_they_are_meant() -> None:
    import peft.utils.other as other

    values = {"a": 4, "m.a": 2, "m.xa": 8, "m.b": 2, "m.a+b": 3, "n.m.b": 5}
    found = pattern(values, 2)
    for module, value in values.items():
        key = other.get_pattern_key(found.keys(), module)
        assert found.get(key, 2) == value, module
