"""What a caller may say: one field a key, everywhere."""

from __future__ import annotations

from dataclasses import fields

import pytest
from click.testing import CliRunner

from loraformat.cli import main
from loraformat.errors import UsageError
from loraformat.formats.kit.base import Hints
from loraformat.merger.plan.data import AdapterSource
from loraformat.model.assumptions import KEYS, Assumptions, parse_value

GIVEN = {
    "alpha": ("16", 16.0),
    "rank": ("8.0", 8),
    "scale": ("0.5", 0.5),
    "fan_in_fan_out": ('["c_fc"]', ("c_fc",)),
    "enable_lora": ("[true, false, true]", (True, False, True)),
    "task": ("SEQ_CLS", "SEQ_CLS"),
    "component": ("transformer_2", "transformer_2"),
}


def test_every_key_is_a_field_of_all_that_carry_assumptions() -> None:
    assert set(KEYS) == set(GIVEN) == {field.name for field in fields(Assumptions)}
    for kind in (Hints, AdapterSource):
        assert set(KEYS) < {field.name for field in fields(kind)}


@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_what_its_text_says(key: str) -> None:
    text, value = GIVEN[key]
    found = parse_value(key, text)
    assert (found, type(found)) == (value, type(value))
    assert Assumptions(**{key: found}).said() == {**dict.fromkeys(KEYS), key: value}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("text", ["", "{}", "NaN", "null", '"x"', "[]", "[1]", "true false"])
def test_what_a_key_cannot_be_is_refused_with_what_it_can_be(key: str, text: str) -> None:
    done = CliRunner().invoke(main, ["inspect", "nowhere", "--assume", f"{key}={text}"])
    assert done.exit_code == 2
    assert f"expected {KEYS[key].expected}" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("key", ["alpha", "scale"])
def test_numbers_are_finite(key: str) -> None:
    for kind in (Assumptions, Hints):
        with pytest.raises(UsageError, match="finite"):
            kind(**{key: float("inf")})


def test_the_help_names_every_key() -> None:
    said = " ".join(CliRunner().invoke(main, ["inspect", "--help"]).output.split())
    assert all(f"{key}=" in said for key in KEYS)
