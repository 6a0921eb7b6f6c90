"""Head counts as config.json states them."""

from __future__ import annotations

import pytest

from loraformat.errors import ConfigError
from loraformat.naming import Heads, heads_of


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 8, "hidden_size": 64}, Heads(8, 8, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}, Heads(8, 2, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 5}, Heads(8, 2, 5)),
        ({"text_config": {"num_attention_heads": 2, "hidden_size": 6}}, Heads(2, 2, 3)),
    ],
)
def test_heads(config: dict[str, object], expected: Heads) -> None:
    assert heads_of(config) == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "found nothing"),
        ({"num_attention_heads": "8"}, "positive integer"),
        ({"num_attention_heads": True, "hidden_size": 8}, "positive integer"),
        ({"num_attention_heads": 8, "hidden_size": 4}, "less than one row"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3, "hidden_size": 64}, "cannot be divided among"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        heads_of(config)
