"""What older versions of PEFT know, against the table that is derived from PEFT's releases, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
from strategies import lazy

from loraformat.formats.kit.update_slots import Slots
from loraformat.formats.peft.config.versions import (
    OLDEST,
    SINCE,
    downgraded,
    faults,
    is_known,
    patterns_decide,
    text_of,
    unknown_settings,
)
from loraformat.model.bundle import Json
from loraformat.model.updates import Dense, LowRank, Magnitude, Replace, Rows
from loraformat.rules.targets import key_of, parse

RELEASES = [(0, minor) for minor in range(5, 22)]


def fields() -> dict[str, str]:
    """Field → the release that brought it, "" for one before 0.7 (tests/derive_peft_versions.py)."""
    found = parse("peft").settings
    assert found is not None
    return dict(found)


def test_each_field_came_with_the_release_that_brought_it() -> None:
    assert {name: text_of(since) for name, since in SINCE.items() if since > (0, 6)} == {
        name: since for name, since in fields().items() if since
    }
    assert {name for name, since in SINCE.items() if since == (0, 6)} == {"alpha_pattern", "rank_pattern"}


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_knows_the_fields_up_to_its_own(version: tuple[int, int]) -> None:
    patterns = {} if version >= (0, 6) else {"alpha_pattern", "rank_pattern"}
    known = {name for name, since in fields().items() if key_of(since or "0.5")[:2] <= version} - set(patterns)
    assert {name for name in [*fields(), "no_field_of_peft"] if is_known(name, version)} == known
    told = dict[str, Json](dict.fromkeys([*fields(), "no_field_of_peft"], "x"))
    assert unknown_settings(told, version) == sorted(told.keys() - known - {"peft_version"})
    assert downgraded(told, version) == {**dict.fromkeys(known, "x"), "init_lora_weights": True}


@pytest.mark.parametrize("value", [None, False, "", [], {}, 0])
def test_a_field_that_says_nothing_is_not_missed(value: Any) -> None:
    assert unknown_settings({"use_dora": value, "lora_bias": value}, OLDEST) == []


@pytest.mark.parametrize(
    ("name", "silent", "telling"),
    [
        ("megatron_core", "megatron.core", "my.core"),
        ("qalora_group_size", 16, 32),
        ("runtime_config", {"ephemeral_gpu_offload": False}, {"ephemeral_gpu_offload": True}),
        ("peft_version", "0.21.2", None),
    ],
)
def test_a_field_with_its_default_is_not_missed(name: str, silent: Any, telling: Any) -> None:
    assert unknown_settings({name: silent}, OLDEST) == []
    assert unknown_settings({name: telling}, OLDEST) == ([name] if telling else [])


def pair(kernel: tuple[int, ...] = (), *, has_dora: bool = False, is_embedding: bool = False) -> LowRank:
    magnitude = Magnitude(lazy(4), 0 if is_embedding else 1) if has_dora else None
    return LowRank(lazy(4, 2), lazy(2, 4), 1.0, magnitude, kernel, is_embedding)


@pytest.mark.parametrize(
    ("slots", "layers", "first", "told"),
    [
        (Slots(low_rank=pair()), None, (0, 5), ""),
        (Slots(low_rank=pair(is_embedding=True)), None, (0, 5), ""),
        (Slots(low_rank=pair((1, 1))), None, (0, 5), ""),
        (Slots(replace=Replace(lazy(4, 4))), None, (0, 5), ""),
        (Slots(low_rank=pair(has_dora=True)), None, (0, 9), "DoRA (since 0.9)"),
        (Slots(low_rank=pair((1, 1), has_dora=True)), None, (0, 10), "DoRA of a convolution (since 0.10)"),
        (Slots(low_rank=pair()), (0, 0), (0, 10), "repeated layers (layer_replication, since 0.10)"),
        (Slots(low_rank=pair((1, 1, 1))), None, (0, 14), "a convolution along three axes (since 0.14)"),
        (Slots(low_rank=pair((1, 1, 1), has_dora=True)), None, (0, 14), "a convolution along three axes (since 0.14)"),
        (Slots(low_rank=pair((1,))), None, (0, 15), "a convolution along one axis (since 0.15)"),
        (Slots(dense=Dense(lazy(4))), None, (0, 14), "a trained bias of lora_B (lora_bias, since 0.14)"),
        (Slots(rows=Rows((1,), lazy(1, 4))), None, (0, 15), "trained rows (trainable_token_indices, since 0.15)"),
        (
            Slots(low_rank=pair(has_dora=True, is_embedding=True)),
            None,
            (0, 16),
            "DoRA of an embedding (since 0.16)",
        ),
    ],
)
def test_an_update_is_computed_from_its_first_release_on(
    slots: Slots, layers: tuple[int, ...] | None, first: tuple[int, int], told: str
) -> None:
    for version in RELEASES:
        found = [fault for _, fault in faults({"m.weight": slots}, layers, version)]
        assert found == ([told] if version < first else []), version


def test_a_bias_with_a_factor_is_merged_with_it_since_0_16() -> None:
    slots = {"m.bias": Slots(dense=Dense(lazy(4), 0.5))}
    told = {version: [fault for _, fault in faults(slots, None, version)] for version in RELEASES}
    factor = ["a trained bias of lora_B with a factor (merged with it since 0.16)"]
    assert [told[0, minor] for minor in (14, 15, 16)] == [factor, factor, []]
    assert told[0, 13] == ["a trained bias of lora_B (lora_bias, since 0.14)"]


@pytest.mark.parametrize(
    ("rank_keys", "alpha_keys", "first"),
    [
        ([], [], (0, 5)),
        (["m.a.q"], [], (0, 6)),
        ([], ["m.a.q"], (0, 6)),
        (["m.a.q"], ["m.a.q"], (0, 6)),
        (["^m.a.q"], [], (0, 15)),
        ([], ["^m.a.q"], (0, 15)),
        (["a.q"], [], (0, 15)),  # the end of a path, not a path
        (["m.a.q"], ["q"], (0, 15)),  # one key decides about both
        (["q"], [], (0, 15)),
        (["no.module"], [], (0, 6)),
    ],
)
def test_patterns_mean_the_same_from_a_release_on(
    rank_keys: list[str], alpha_keys: list[str], first: tuple[int, int]
) -> None:
    settings = {"rank_pattern": dict.fromkeys(rank_keys, 4), "alpha_pattern": dict.fromkeys(alpha_keys, 4)}
    for version in RELEASES:
        assert patterns_decide(settings, ["m.a.q", "m.b.q"], version) is (version >= first), version


def test_a_path_that_ends_another_does_not_decide_before_0_15() -> None:
    """There `q` is the whole path of one module and the end of the other's."""
    settings = {"rank_pattern": {"q": 4}}
    assert patterns_decide(settings, ["q"], (0, 14))
    assert not patterns_decide(settings, ["q", "m.q"], (0, 14))
    assert patterns_decide(settings, ["q", "m.q"], (0, 15))
