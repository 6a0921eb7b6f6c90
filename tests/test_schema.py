"""The schemas themselves: valid, versioned, with examples that hold and mistakes that do not."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat import schema
from loraformat.diagnostics import json_path

CONFIGS = ("native-config-0", "native-config-1", "peft-adapter-config", "peft-tuner-config")

MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [
    ("native-config-0", {}, "", "'rank' is a required property"),
    ("native-config-0", {"rank": 0}, "rank", "expected an integer of 1 to 65536, found 0"),
    ("native-config-0", {"rank": True}, "rank", "expected an integer of 1 to 65536, found true"),
    ("native-config-0", {"rank": 4, "alpha": "8"}, "alpha", 'found "8"'),
    ("native-config-0", {"rank": 4, "format_version": 1}, "format_version", "no such field"),
    ("native-config-0", {"rank": 4, "target_modules": [3]}, "target_modules[0]", "expected a name, found 3"),
    ("native-config-1", {"format_version": 1, "method": "lora", "rank": 4}, "", "'alpha' is a required property"),
    ("native-config-1", {"format_version": 1, "method": "lora", "rank": 4, "alpha": None}, "alpha", "a finite number"),
    ("peft-adapter-config", {"peft_type": "LORA", "r": 4, "target_modules": None}, "target_modules", "at least one"),
    ("peft-adapter-config", {"peft_type": "LORA", "r": 4, "target_modules": []}, "target_modules", "at least one"),
    ("peft-adapter-config", {"peft_type": "LORA", "r": "4", "target_modules": ["q"]}, "r", 'found "4"'),
    (
        "peft-adapter-config",
        {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "rank_pattern": {"a.b": -1}},
        'rank_pattern["a.b"]',
        "found -1",
    ),
]


@pytest.mark.parametrize("name", schema.names())
def test_every_schema_is_valid_and_versioned(name: str) -> None:
    loaded = schema.load(name)
    jsonschema.Draft202012Validator.check_schema(loaded)
    assert loaded["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert re.search(r"[:-]\d+(\.schema\.json)?$", loaded["$id"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_example_holds(name: str) -> None:
    examples = schema.load(name)["examples"]
    assert examples
    for example in examples:
        assert list(schema.check(name, example)) == []


@pytest.mark.parametrize(("name", "config", "place", "message"), MISTAKES)
def test_a_mistake_is_found_at_its_place(name: str, config: dict[str, Any], place: str, message: str) -> None:
    found = list(schema.check(name, config))
    assert [json_path(where) for where, _ in found] == [place]
    assert message in found[0][1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70_000) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "q_proj", "rank"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_quick_look_never_passes_what_jsonschema_does_not(name: str, data: st.DataObject) -> None:
    loaded = schema.load(name)
    value = dict(data.draw(st.sampled_from(loaded["examples"])))
    for key in data.draw(st.lists(st.sampled_from([*loaded["properties"], "unheard_of"]), max_size=3)):
        if data.draw(st.booleans()):
            value[key] = data.draw(VALUES)
        else:
            value.pop(key, None)
    is_valid = jsonschema.Draft202012Validator(loaded).is_valid(value)
    assert is_valid or not schema._holds(loaded, value, loaded)
    assert (list(schema.check(name, value)) == []) == is_valid


@pytest.mark.parametrize("name", ["native-config-1", "peft-adapter-config", "peft-tuner-config"])
def test_the_quick_look_passes_the_examples(name: str) -> None:
    loaded = schema.load(name)
    assert all(schema._holds(loaded, example, loaded) for example in loaded["examples"])


def test_long_values_are_cut() -> None:
    (found,) = schema.check("native-config-0", {"rank": "x" * 10_000})
    assert len(found[1]) < 200


def test_an_unknown_schema_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        schema.load("nothing")
