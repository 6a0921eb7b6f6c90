"""The schemas themselves: valid, versioned, with examples that hold and mistakes that do not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat import schema
from loraformat.diagnostics import json_path

ROOT = Path(__file__).parent.parent
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
def test_the_same_places_are_found_as_by_jsonschema(name: str, data: st.DataObject) -> None:
    loaded = schema.load(name)
    value = dict(data.draw(st.sampled_from(loaded["examples"])))
    for key in data.draw(st.lists(st.sampled_from([*loaded["properties"], "unheard_of"]), max_size=3)):
        if data.draw(st.booleans()):
            value[key] = data.draw(VALUES)
        else:
            value.pop(key, None)
    errors = list(jsonschema.Draft202012Validator(loaded).iter_errors(value))
    found = list(schema.check(name, value))
    assert {path for path, _ in found} == {tuple(error.absolute_path) for error in errors}
    missing = {error.message for error in errors if error.validator == "required"}
    assert missing == {message for _, message in found if message.endswith("is a required property")}


@pytest.mark.parametrize("key", ["a.b", "[0]", "{x}", "a.b[0].c", "\n", ""])
def test_a_key_is_found_whatever_it_holds(key: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "rank_pattern": {"a": 4, key: -1}}
    assert [path for path, _ in schema.check("peft-adapter-config", config)] == [("rank_pattern", key)]


@pytest.mark.parametrize("name", schema.names())
def test_the_installed_validators_are_those_of_the_schemas(name: str) -> None:
    made = runpy.run_path(str(ROOT / "schemas" / "compile.py"))
    stored = ROOT / "loraformat" / "_validators" / f"{made['module_of'](name)}.py"
    assert stored.read_text(encoding="utf-8") == made["source_of"](schema.load(name)), "python schemas/compile.py"


def test_a_checkout_that_was_not_built_makes_its_validators_in_memory() -> None:
    validate = schema._compiled("native-config-0")
    validate({"rank": 4})
    with pytest.raises(schema.Faults):
        validate({"rank": 0})


def test_long_values_are_cut() -> None:
    (found,) = schema.check("native-config-0", {"rank": "x" * 10_000})
    assert len(found[1]) < 200


def test_an_unknown_schema_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        schema.load("nothing")


def test_what_stands_beside_a_reference_counts() -> None:
    """The library that writes the validators follows draft 7, which ignores it."""
    digests = {"schema": "urn:loraformat:schema:manifest:2", "outputs": []}
    found = dict(schema.check("manifest", digests))
    wanted = {
        tuple(error.absolute_path)
        for error in jsonschema.Draft202012Validator(schema.load("manifest")).iter_errors(digests)
    }
    assert ("outputs",) in found
    assert set(found) == wanted
