"""Fields of a config.json, checked, and what blueprints of all kinds are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from loraformat.diagnostics import in_file
from loraformat.errors import ConfigError
from loraformat.model.bundle import Json

# (name, shape) of weights, in the order of the model.
Shapes: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]

_MOST = 1 << 31
_MOST_WEIGHTS = 1 << 20


class Fields:
    """Fields of a config.json, checked."""

    def __init__(self, config: Mapping[str, Json]) -> None:
        self._config = config

    def count(self, *names: str, default: int | None = None) -> int:
        """The first of the fields that is there, at least 1. Raises ConfigError (LF103)."""
        found = next((self._config[name] for name in names if self._config.get(name) is not None), default)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < _MOST:
            raise ConfigError(f"{names[0]}: expected a positive integer, found {found!r}", where=in_file("config.json"))
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        found = self._config.get(name)
        return found if isinstance(found, bool) else default

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of integers; () where there is none."""
        found = self._config.get(name)
        return tuple(each for each in found if isinstance(each, int)) if isinstance(found, (list, tuple)) else ()

    def layers(self, *names: str, weights: int) -> int:
        """How many layers of `weights` weights there are. Raises ConfigError (LF103): more than any model has."""
        layers = self.count(*names)
        if layers * weights > _MOST_WEIGHTS:
            raise ConfigError(
                f"{names[0]}: {layers} layers would have more weights than any model", where=in_file("config.json")
            )
        return layers


def with_bias(module: str, shape: tuple[int, ...], has_bias: bool = True, outputs: int = 0) -> Shapes:
    """A module's weight and, where it has one, its bias; `outputs` is the axis of the weight that the bias has."""
    yield f"{module}.weight", shape
    if has_bias:
        yield f"{module}.bias", (shape[outputs],)
