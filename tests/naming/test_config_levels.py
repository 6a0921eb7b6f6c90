"""The levels of config.json."""

from __future__ import annotations

import pytest

from loraformat.naming import levels_of


def test_a_composed_model_has_two_levels() -> None:
    text = {"vocab_size": 5}
    config = {"model_type": "llava", "text_config": text}
    assert list(levels_of(config)) == [((), config), (("text_config",), text)]


@pytest.mark.parametrize("nested", [None, 3, "text", ["vocab_size"]])
def test_anything_but_an_object_is_no_level(nested: object) -> None:
    config = {"text_config": nested}
    assert list(levels_of(config)) == [((), config)]
    assert list(levels_of({})) == [((), {})]
