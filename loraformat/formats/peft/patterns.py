"""Which modules the names and patterns of an adapter_config.json mean. Never slow, whatever they are.

Source: peft 0.21.2, utils/other.py `get_pattern_key`; tuners/tuners_utils.py `check_target_module_exists`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraformat.budget import Budget
from loraformat.diagnostics import show
from loraformat.errors import ConfigError
from loraformat.model import pattern_keys


class PatternKeys:
    """The keys of `rank_pattern` or `alpha_pattern`, looked up as PEFT does: the first one in file order that matches.

    Raises (when made): ConfigError (LF103): a pattern that cannot be evaluated in bounded time.
    """

    def __init__(self, where: str, keys: Sequence[str], budget: Budget) -> None:
        self._where = where
        self._keys = pattern_keys.PatternKeys(keys, budget)
        if self._keys.unread:
            raise self._not_evaluated(self._keys.unread[0], "it could take for ever")

    def _not_evaluated(self, key: str, why: str) -> ConfigError:
        where = f'{self._where}["{show(key, 80)}"]'
        return ConfigError(f"the pattern is not evaluated: {why}", where=where, hint="write full module names")

    def first_match(self, module: str) -> str | None:
        """The key that decides about `module`, or None.

        Raises: ConfigError (LF103): the lookups of all modules together would take too long.
        """
        try:
            return self._keys.first_match(module)
        except pattern_keys.OutOfSteps as error:
            raise self._not_evaluated(error.key, "it is too large for so many or so long names") from error


def is_end(name: str, module: str) -> bool:
    """Whether `name` is the module or its end from a dot on, as names in `target_modules` select."""
    return module == name or module.endswith(f".{name}")


def is_inside(path: str, name: str) -> bool:
    """Whether `name` is a run of components of `path`, as names in `modules_to_save` select."""
    return f".{name}." in f".{path}."


def lookup(values: Mapping[str, int] | Mapping[str, float], keys: PatternKeys, module: str) -> float | None:
    """The value of the first key that matches `module`, or None."""
    key = keys.first_match(module)
    return None if key is None else values[key]
