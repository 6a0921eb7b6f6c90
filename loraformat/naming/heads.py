"""Numbers of attention heads, by which some code orders the rows of query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraformat.diagnostics import in_file, show
from loraformat.errors import ConfigError
from loraformat.naming.config_levels import levels_of

_CONFIG = "config.json"
_MOST = 1 << 30


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention layer.

    Attributes:
        query, key: how many of each; values have as many as keys.
        size: rows of one head.
    """

    query: int
    key: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value."""
        return self.query * self.size, self.key * self.size, self.key * self.size


def heads_of(config: Mapping[str, object]) -> Heads:
    """The heads that config.json states, in the words of transformers.

    >>> heads_of({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}).rows
    (64, 16, 16)

    Raises: ConfigError (LF103): a field is missing or is not a positive integer, or the counts contradict each other.
    """
    level = next((each for _, each in levels_of(config) if "num_attention_heads" in each), config)
    query = _count(level, "num_attention_heads")
    key = query if level.get("num_key_value_heads") is None else _count(level, "num_key_value_heads")
    size = _count(level, "hidden_size") // query if level.get("head_dim") is None else _count(level, "head_dim")
    if query % key or not size:
        text = (
            f"{query} query heads cannot be divided among {key} key heads"
            if size
            else f"{query} heads leave less than one row per head"
        )
        raise ConfigError(text, where=in_file(_CONFIG, "num_attention_heads"))
    return Heads(query, key, size)


def _count(config: Mapping[str, object], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        found = "nothing" if value is None else show(value, 40)
        raise ConfigError(f"expected a positive integer, found {found}", where=in_file(_CONFIG, field))
    return value
