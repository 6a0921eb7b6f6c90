"""The levels of config.json: a composed model has the settings of its language model in `text_config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_TEXT = "text_config"


def levels_of(config: Mapping[str, Value]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Value]]]:
    """(path of keys, settings) of the whole model, and of the language model in it where there is one.

    Source: transformers 5.23.0, configuration_utils.py `get_text_config`.
    """
    yield (), config
    nested = config.get(_TEXT)
    if isinstance(nested, Mapping):
        yield (_TEXT,), nested
