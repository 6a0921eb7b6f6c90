"""PEFT's layout: what its files mean, what is refused, what is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bundles import bundle, tensors
from formats.equal import assert_same_updates
from strategies import values

from loraformat.errors import AssumptionContradicted, ConfigError, FormatError, MissingFile, UnsupportedUpdate
from loraformat.formats import peft
from loraformat.formats.kit.base import Hints
from loraformat.model.adapter import Adapter
from loraformat.model.updates import Dense, Hadamard, Kronecker, LowRank, Replace, Rows

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
P = "base_model.model."
A, B = values(2, 5), values(7, 2, seed=1)
PAIR = {f"{P}m.q.lora_A.weight": A, f"{P}m.q.lora_B.weight": B}


def folder(entries: dict[str, Any] | None = None, **fields: Any) -> Any:
    """The good folder with more tensors and other config fields."""
    return bundle(
        {"adapter_config.json": {**CONFIG, **fields}, "adapter_model.safetensors": {**PAIR, **(entries or {})}}
    )


def read(entries: dict[str, Any] | None = None, hints: Hints = Hints(), **fields: Any) -> Adapter:
    return peft.read(folder({f"{P}{name}": value for name, value in (entries or {}).items()}, **fields), hints=hints)


def codes(adapter: Adapter) -> list[str]:
    return [note.code for note in adapter.notes]


def test_factors_of_a_linear_layer() -> None:
    adapter = read()
    (update,) = adapter.updates["m.q.weight"]
    assert isinstance(update, LowRank)
    assert torch.equal(update.up.torch(), B)
    assert torch.equal(update.down.torch(), A)
    assert (update.scale, adapter.config.declared_ranks, adapter.config.targets) == (2, {"m.q.weight": 2}, ("q",))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 6}}, 3),
        ({"alpha_pattern": {"^m.q": 6}}, 3),
        ({"alpha_pattern": {"k": 6}}, 2),
        ({"alpha_pattern": {".*q": 6, "q": 8}}, 3),
        ({"alpha_pattern": {"q": 8, ".*q": 6}}, 4),
        ({"rank_pattern": {"m.q": 4}}, 1),
        ({"lora_alpha": None}, None),
        ({"lora_alpha": 0.125}, 0.0625),
    ],
)
def test_the_scale_is_the_one_that_peft_applies(fields: dict[str, Any], scale: float | None) -> None:
    assert read(**fields).updates["m.q.weight"][0].scale == scale


def test_a_hint_fills_the_missing_alpha_and_never_contradicts() -> None:
    assert read(hints=Hints(alpha=6), lora_alpha=None).updates["m.q.weight"][0].scale == 3
    assert read(hints=Hints(alpha=4)).updates["m.q.weight"][0].scale == 2
    with pytest.raises(AssumptionContradicted, match="the file states alpha 4, but 6 was given"):
        read(hints=Hints(alpha=6))
    with pytest.raises(AssumptionContradicted, match="the file states rank 2, but 3 was given"):
        read(hints=Hints(rank=3))


def test_dora_along_the_axis_of_the_layer() -> None:
    entries = {
        "m.q.lora_magnitude_vector": values(7),
        "c.lora_A.weight": values(2, 3, 3, 3),
        "c.lora_B.weight": values(6, 2, 1, 1),
        "c.lora_magnitude_vector": values(1, 6, 1, 1),
        "e.lora_embedding_A": values(2, 9),
        "e.lora_embedding_B": values(4, 2),
        "e.lora_magnitude_vector.weight": values(4),
    }
    adapter = read(entries, use_dora=True, target_modules=["q", "c", "e"])
    linear, conv, table = (adapter.updates[name][0] for name in ("m.q.weight", "c.weight", "e.weight"))
    assert [each.magnitude.axis for each in (linear, conv, table)] == [1, 1, 0]
    assert conv.magnitude.vector.shape == (6,)
    assert (conv.shape, table.shape) == ((6, 3, 3, 3), (9, 4))
    assert codes(adapter) == []


def test_whole_weights_and_their_ties() -> None:
    entries = {
        "embed_tokens.weight": values(9, 4),
        "lm_head.weight": values(9, 4),
        "m.q.base_layer.weight": values(7, 5),
        "m.q.base_layer.bias": values(7),
        "norm.bias": values(4),
    }
    adapter = read(entries, modules_to_save=["lm_head"], bias="all")
    follows = {
        weight: update.follows_tie
        for weight, each in adapter.updates.items()
        for update in each
        if isinstance(update, Replace)
    }
    assert follows == {
        "embed_tokens.weight": True,
        "lm_head.weight": False,
        "m.q.weight": True,
        "m.q.bias": True,
        "norm.bias": True,
    }
    assert [type(each) for each in adapter.updates["m.q.weight"]] == [Replace, LowRank]
    assert adapter.config.vocab_size is None
    assert codes(adapter) == []


def test_saved_modules_that_keep_their_tie() -> None:
    adapter = read({"lm_head.weight": values(9, 4)}, modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert adapter.updates["lm_head.weight"][0].follows_tie


def test_copies_that_peft_writes_itself_are_left_out() -> None:
    entries = {f"lm_head.{part}weight": values(9, 4) for part in ("", "modules_to_save.", "original_module.")}
    adapter = read(entries, modules_to_save=["lm_head"])
    assert codes(adapter) == ["LF203"]
    assert list(adapter.updates) == ["lm_head.weight", "m.q.weight"]
    alone = read({"lm_head.modules_to_save.weight": values(9, 4)}, modules_to_save=["lm_head"])
    assert codes(alone) == []
    assert list(alone.updates) == ["lm_head.weight", "m.q.weight"]


def test_weights_that_the_config_does_not_mention_are_noted() -> None:
    adapter = read({"layers.0.norm.weight": values(4), "m.q.weight": values(7, 5)})
    assert codes(adapter) == ["LF224"]
    assert list(adapter.unclaimed) == [f"{P}m.q.weight"]


def test_trained_rows_and_their_numbers() -> None:
    rows = {"x.embed_tokens.token_adapter.trainable_tokens_delta": values(3, 4)}
    for stated in ([5, 1, 39], {"embed_tokens": [5, 1, 39]}):
        (update,) = read(rows, trainable_token_indices=stated).updates["x.embed_tokens.weight"]
        assert isinstance(update, Rows)
        assert update.indices == (5, 1, 39)
    for stated in (None, [1], {"other": [5, 1, 39]}):
        with pytest.raises(ConfigError, match="3 trained rows"):
            read(rows, trainable_token_indices=stated)
    both = rows | {"lm_head.token_adapter.trainable_tokens_delta": values(1, 4)}
    apart = read(both, trainable_token_indices={"embed_tokens": [5, 1, 39], "lm_head": [2]})
    assert [apart.updates[name][0].follows_tie for name in ("x.embed_tokens.weight", "lm_head.weight")] == [False] * 2
    assert_same_updates(peft.read(peft.write(apart)), apart)
    table = {"x.embed_tokens.token_adapter.base_layer.weight": values(40, 4)}
    both = read(rows | table, trainable_token_indices=[5, 1, 39]).updates["x.embed_tokens.weight"]
    assert [type(each) for each in both] == [Replace, Rows]


def test_a_trained_bias_of_the_factor_has_its_scale() -> None:
    adapter = read({"m.q.lora_B.bias": values(7)}, lora_bias=True)
    (update,) = adapter.updates["m.q.bias"]
    assert isinstance(update, Dense)
    assert update.scale == 2


def test_loha_and_lokr() -> None:
    hada = {f"{P}q.hada_w{n}_{part}": values(*shape) for n in (1, 2) for part, shape in (("a", (6, 2)), ("b", (2, 5)))}
    config = {"peft_type": "LOHA", "r": 2, "alpha": 6, "target_modules": ["q"]}
    (update,) = peft.read(bundle({"adapter_config.json": config, "adapter_model.bin": hada})).updates["q.weight"]
    assert isinstance(update, Hadamard)
    assert (update.shape, update.scale) == ((6, 5), 3)
    lokr = {f"{P}q.lokr_w1": values(2, 3), f"{P}q.lokr_w2_a": values(4, 2), f"{P}q.lokr_w2_b": values(2, 5)}
    config["peft_type"] = "LOKR"
    (update,) = peft.read(bundle({"adapter_config.json": config, "adapter_model.bin": lokr})).updates["q.weight"]
    assert isinstance(update, Kronecker)
    assert (update.shape, len(update.right)) == ((8, 15), 2)
    hada[f"{P}q.hada_t1"] = values(2, 2, 3, 3)
    with pytest.raises(FormatError, match="hada_t1"):  # its factors are those of a matrix
        peft.read(bundle({"adapter_config.json": config, "adapter_model.bin": hada}))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"peft_type": "NEW_TUNER"}, "NEW_TUNER"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING.*no weight"),
        ({"peft_type": "XLORA"}, "XLORA.*depends on the input"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"init_lora_weights": "LOFTQ"}, "LOFTQ"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "corda"}, "corda"),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedUpdate, match=name):
        read(**fields)


def test_unknown_layers_inside_wrapped_layers_are_refused() -> None:
    with pytest.raises(UnsupportedUpdate, match="unknown"):
        read({"m.q.base_layer.lora_A.weight": A, "m.q.base_layer.lora_B.weight": B})


def test_settings_that_change_nothing_are_read_past() -> None:
    harmless = {"eva_config": {"rho": 2.0}, "corda_config": None, "loftq_config": {}, "init_lora_weights": "gaussian"}
    assert codes(read(**harmless, future_flag=False, future_list=[], future_none=None)) == []
    adapter = read(future_config={"a": 1})
    assert codes(adapter) == ["LF226"]
    assert "future_config" in adapter.notes[0].message


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"r": "4"}, "r: expected an integer"),
        ({"r": True}, "r: expected an integer"),
        ({"r": None}, "r: the rank is missing"),
        ({"peft_type": None}, "peft_type: the field is missing"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number"),
        ({"rank_pattern": []}, "rank_pattern: expected an object"),
        ({"rank_pattern": {"q": -1}}, r'rank_pattern\["q"\]: expected an integer'),
        ({"alpha_pattern": {"q": None}}, r'alpha_pattern\["q"\]: expected a finite number'),
        ({"target_modules": 7}, "target_modules: expected a list"),
        ({"target_modules": ["q", 3]}, r"target_modules\[1\]: expected a string"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list"),
        ({"bias": "some"}, "bias: expected"),
        ({"use_dora": "yes"}, "use_dora: expected true or false"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices\[0\]"),
        ({"trainable_token_indices": [1, 1]}, "occurs twice"),
        ({"trainable_token_indices": 3}, "expected a list of token numbers"),
    ],
)
def test_a_wrong_type_names_the_field(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        read(**fields)


@pytest.mark.parametrize("names", ["{}.default", "{}", "_orig_mod.{}", "module.{}", "base_model.model.{}"])
def test_foreign_parts_of_names_are_read_through(names: str) -> None:
    prefix, _, suffix = names.partition("{}")
    entries = {f"{prefix}{P}m.q.lora_{side}{suffix}.weight": value for side, value in (("A", A), ("B", B))}
    adapter = peft.read(bundle({"adapter_config.json": CONFIG, "adapter_model.safetensors": entries}))
    assert list(adapter.updates) == ["m.q.weight"]
    assert codes(adapter) == ([] if names == "{}" else ["LF221"])


def test_a_missing_prefix_is_read_through() -> None:
    entries = {name.removeprefix(P): value for name, value in PAIR.items()}
    adapter = peft.read(bundle({"adapter_config.json": CONFIG, "adapter_model.safetensors": entries}))
    assert list(adapter.updates) == ["m.q.weight"]
    assert codes(adapter) == ["LF221"]


def test_two_adapters_or_two_names_for_one_tensor_are_refused() -> None:
    two = {f"{P}m.q.lora_{side}.{name}.weight": A for side in "AB" for name in ("a", "b")}
    with pytest.raises(FormatError, match="2 adapters: a, b"):
        peft.read(bundle({"adapter_config.json": CONFIG, "adapter_model.safetensors": two}))
    with pytest.raises(FormatError, match="mean the same tensor"):
        peft.read(folder({"m.q.lora_A.weight": A}))


def test_what_is_announced_and_absent_is_noted() -> None:
    assert codes(read(use_dora=True)) == ["LF225"]
    assert codes(read(modules_to_save=["lm_head"])) == ["LF225"]
    assert codes(read(modules_to_save=["classifier", "score"])) == []
    assert codes(read(trainable_token_indices=[1])) == ["LF225"]


def test_half_a_pair_and_unknown_parts_are_kept() -> None:
    adapter = read({"m.k.lora_A.weight": A, "m.q.lora_diag": values(2), "m.q.lora_new.weight": A, "m.ia3_l": A})
    assert codes(adapter) == ["LF201"]
    assert list(adapter.unclaimed) == [
        f"{P}{name}" for name in ("m.ia3_l", "m.k.lora_A.weight", "m.q.lora_diag", "m.q.lora_new.weight")
    ]
    assert list(adapter.updates) == ["m.q.weight"]


def test_missing_files() -> None:
    with pytest.raises(MissingFile, match="adapter_config"):
        peft.read(bundle({"adapter_model.safetensors": PAIR}))
    with pytest.raises(MissingFile, match="adapter_model"):
        peft.read(bundle({"adapter_config.json": CONFIG}))
    assert peft.sniff(bundle({"adapter_config.json": {"fine_tune_type": "lora"}})) is None


def test_safetensors_win_over_a_pickle_that_stays_behind() -> None:
    both = {"adapter_config.json": CONFIG, "adapter_model.safetensors": PAIR, "adapter_model.bin": {}}
    adapter = peft.read(bundle(both))
    assert list(adapter.updates) == ["m.q.weight"]
    assert codes(adapter) == ["LF222"]
    wrapped = tensors(PAIR, "torch", wrapper=("state_dict",))
    assert codes(peft.read(bundle({"adapter_config.json": CONFIG, "adapter_model.bin": wrapped}))) == ["LF223"]
