"""PEFT's layout: what is written, and what is refused before writing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle, loaded
from formats.equal import assert_same_updates
from hypothesis import given, settings
from strategies import adapters, lazy, values

from loraformat.diagnostics import Severity
from loraformat.formats import peft
from loraformat.formats.kit.base import WriteOptions
from loraformat.formats.peft.config import versions
from loraformat.model.adapter import Adapter, AdapterConfig
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows

P = "base_model.model."


def read(**fields: Any) -> Adapter:
    """One layer of rank 2 and alpha 4, with other config fields."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **fields}
    pair = {f"{P}m.q.lora_A.weight": values(2, 5), f"{P}m.q.lora_B.weight": values(7, 2, seed=1)}
    return peft.read(bundle({"adapter_config.json": config, "adapter_model.safetensors": pair}))


@given(adapters(with_layer=True))
@settings(max_examples=80)
def test_what_is_written_comes_back(adapter: Adapter) -> None:
    found = list(peft.losses(adapter))
    if found:
        # Only rows beside factors of the same table, or DoRA beside plain updates, can be at fault here.
        assert {each.code for each in found} == {"LF702"}
        return
    for container in ("safetensors", "torch"):
        again = peft.read(peft.write(adapter, WriteOptions(container=container)))
        assert_same_updates(again, adapter)
        assert not again.unclaimed
        assert not [note for note in again.notes if note.severity > Severity.INFO]


def written(adapter: Adapter) -> dict[str, Any]:
    assert [each.code for each in peft.losses(adapter) if each.severity is Severity.ERROR] == []
    return loaded(peft.write(adapter))["adapter_config.json"]


def test_free_settings_of_the_source_are_kept_and_facts_recomputed() -> None:
    source = read(
        lora_dropout=0.1,
        megatron_core="x",
        r=2,
        rank_pattern={"gone": 3},
        use_rslora=True,
        layers_to_transform=[0],
        exclude_modules=["k"],
        target_modules=["q", "v"],
        revision="abc",
    )
    config = written(source)
    assert (config["lora_dropout"], config["megatron_core"], config["revision"]) == (0.1, "x", "abc")
    assert (config["use_rslora"], config["lora_alpha"], config["rank_pattern"]) == (True, 4, {})
    assert config["target_modules"] == ["m.q"]
    assert "layers_to_transform" not in config
    assert "exclude_modules" not in config


def test_a_scale_by_root_is_written_plainly_where_alpha_does_not_give_it() -> None:
    source = read(use_rslora=True)
    (update,) = source.updates["m.q.weight"]
    other = replace(source, updates={"m.q.weight": (replace(update, scale=1.5),)})
    assert (written(other)["use_rslora"], written(other)["lora_alpha"]) == (False, 3)


@pytest.mark.parametrize(("scale", "alpha"), [(2.0, 4), (1.5, 3), (0.3, 0.6), (4 / 3, 8 / 3)])
def test_alpha_is_an_integer_where_one_is_exact(scale: float, alpha: float) -> None:
    layer = LowRank(lazy(7, 2), lazy(2, 5), scale)
    found = written(Adapter(config=AdapterConfig(), updates={"q.weight": (layer,)}))["lora_alpha"]
    assert found == alpha
    assert found / 2 == scale


def test_keys_that_would_catch_another_module_are_anchored() -> None:
    def layer(rank: int) -> tuple[LowRank]:
        return (LowRank(lazy(7, rank), lazy(rank, 5), 4 / rank),)

    updates = {"a.q.weight": layer(3), "x.a.q.weight": layer(2), "y.q.weight": layer(2)}
    adapter = Adapter(config=AdapterConfig(), updates=updates)
    assert written(adapter)["rank_pattern"] == {r"^a\.q": 3}
    assert_same_updates(peft.read(peft.write(adapter)), adapter)


def test_what_peft_cannot_hold_is_refused_before_writing() -> None:
    layer = LowRank(lazy(7, 2), lazy(2, 5), 2.0)
    dora = replace(layer, magnitude=Magnitude(lazy(7)))
    table = Replace(lazy(9, 4), follows_tie=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a.weight": (layer, layer)}, "sequence of updates"),
        ({"a.weight": (layer,), "b.weight": (dora,)}, "plain update among DoRA"),
        ({"a.weight": (layer,), "b.bias": (Dense(lazy(7)),)}, "dense delta"),
        ({"a.weight": (layer,), "a.bias": (Dense(lazy(7), 1.0),)}, "dense delta"),
        ({"a.weight": (table, layer)}, "saved as a whole"),
        (
            {"a.weight": (layer,), "e.weight": (Rows((1,), lazy(1, 4), follows_tie=False),)},
            "tied partner does not share",
        ),
        ({"a.weight": (layer,), "e.weight": (table, Rows((1,), lazy(1, 4)))}, "another update of the table"),
        ({"e.weight": (table,)}, "without low-rank updates"),
        ({"a.dense.weight": (layer,), "a.weight": (table,)}, "inside the saved module"),
        ({"a.in_proj_weight": (layer,)}, "not called weight"),
        ({"a.weight": (replace(layer, magnitude=Magnitude(lazy(5), 0)),)}, "other axis"),
        ({"a.weight": (replace(layer, scale=None),)}, "state no alpha"),
    ]
    for updates, fault in cases:
        found = list(peft.losses(Adapter(config=AdapterConfig(), updates=updates)))
        assert any(fault in each.message and each.severity is Severity.ERROR for each in found), fault


def test_what_other_formats_say_and_peft_does_not_is_listed() -> None:
    layer = LowRank(lazy(7, 2), lazy(2, 5), 2.0)
    config = AdapterConfig(base_fingerprint="x", tied=(), raw={"rank": 2, "author": "me"})
    adapter = Adapter(config=config, updates={"a.weight": (layer,)}, unclaimed={"b": lazy(1)})
    for container, lost in (("safetensors", "tied, author"), ("torch", "base_fingerprint, tied, author")):
        found = list(peft.losses(adapter, WriteOptions(container=container)))
        assert [(each.code, each.severity) for each in found] == [("LF706", Severity.WARNING), ("LF703", Severity.INFO)]
        assert found[1].message == f"the target format has no place for {lost}: left out"


def test_the_versions_of_fields_are_those_that_the_wheels_say() -> None:
    """A second opinion: derive_peft_versions.py reads them from PEFT's wheels, the oldest of which is 0.6."""
    runtimes = json.loads((Path(versions.__file__).parents[3] / "rules" / "runtimes.json").read_text(encoding="utf-8"))
    derived = {name: since for name, since in runtimes["peft"]["fields"].items() if since}
    ours = {name: versions.text_of(since) for name, since in versions.SINCE.items() if since > (0, 6)}
    assert ours == derived


def test_full_paths_decide_in_old_versions_unless_one_ends_another() -> None:
    stated = {"rank_pattern": {"net.a.q": 4}, "alpha_pattern": {"net.b.q": 8}}
    assert versions.patterns_decide(stated, ["net.a.q", "net.b.q"], (0, 10))
    assert not versions.patterns_decide(stated, ["net.a.q", "net.b.q", "outer.net.a.q"], (0, 10))
    assert versions.patterns_decide(stated, ["net.a.q", "net.b.q", "outer.net.a.q"], (0, 15))
    assert not versions.patterns_decide({"alpha_pattern": {"^q": 8}}, ["q"], (0, 14))
    assert not versions.patterns_decide(stated, ["net.a.q"], (0, 5))
