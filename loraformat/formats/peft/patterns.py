"""Which modules the names and patterns of an adapter_config.json select, in bounded time.

Source: peft 0.21.2, utils/other.py `get_pattern_key`; tuners/tuners_utils.py `check_target_module_exists`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loraformat.budget import Budget
from loraformat.diagnostics import NOWHERE, FindingLocation, show
from loraformat.errors import ConfigError
from loraformat.model.patterns import keys as pattern_keys
from loraformat.model.patterns.keys import ends_of


class PatternKeys:
    """The keys of `rank_pattern` or `alpha_pattern`, looked up as PEFT does: the first one in file order that matches.

    Raises (when made): ConfigError (LF103): a pattern that cannot be evaluated in bounded time.
    """

    def __init__(self, where: FindingLocation, keys: Sequence[str], budget: Budget) -> None:
        self._where = where
        self._keys = pattern_keys.PatternKeys(keys, budget)
        if self._keys.unread:
            raise self._not_evaluated(self._keys.unread[0], "matching it could take forever")

    def _not_evaluated(self, key: str, why: str) -> ConfigError:
        where = self._where.at(show(key, 80))
        return ConfigError(f"the pattern is not evaluated: {why}", where=where, hint="write full module names")

    def first_match(self, module: str) -> str | None:
        """The key that decides about `module`, or None.

        Raises: ConfigError (LF103): the lookups of all modules together would take too long.
        """
        try:
            return self._keys.first_match(module)
        except pattern_keys.OutOfSteps as error:
            raise self._not_evaluated(error.key, "it is too large for so many or such long names") from error


class Ends:
    """Names that select a module which they are, or whose end they are from a dot on, as `target_modules` does."""

    def __init__(self, names: Iterable[str]) -> None:
        self._orders: dict[str, int] = {}
        for order, name in enumerate(names):
            self._orders.setdefault(name, order)

    def of(self, module: str) -> list[str]:
        """The names that select a module, in their order."""
        found = [end for end in ends_of(module) if end in self._orders] if self._orders else []
        return sorted(found, key=self._orders.__getitem__)


class Inside:
    """Names that select a module whose path ends with their text, and all below it, as `modules_to_save` does.

    No dot is needed in front: "norm" selects `model.norm`, and `model.layers.0.input_layernorm` too.
    Source: peft 0.21.2, utils/other.py `_set_trainable`: `key.endswith(target_key)` for every module.
    """

    def __init__(self, names: Iterable[str], budget: Budget, where: FindingLocation = NOWHERE) -> None:
        # The last component, "" where it is the only one → (components, length of the first) → names.
        self._names: dict[str, dict[tuple[int, int], set[str]]] = {}
        self._budget, self._where = budget, where
        for name in filter(None, names):
            first, dot, others = name.partition(".")
            last = others.rpartition(".")[2] if dot else ""
            shape = (name.count(".") + 1, len(first))
            self._names.setdefault(last, {}).setdefault(shape, set()).add(name)

    def of(self, path: str) -> set[str]:
        """The names that select a path.

        Raises: ConfigError (LF103): the names and paths together are too many.
        """
        if not self._names:
            return set()
        parts = path.split(".")
        found: set[str] = set()
        for end, last in enumerate(parts, 1):
            for key in ("", last):
                for (count, length), names in self._names.get(key, {}).items():
                    self._spend(count)
                    if count <= end:
                        cut = max(0, len(parts[end - count]) - length)
                        found |= {".".join(parts[end - count : end])[cut:]} & names
        return found

    def _spend(self, steps: int) -> None:
        if not self._budget.spend(steps):
            raise ConfigError("too many names for so many modules, so they are not evaluated", where=self._where)


def lookup(values: Mapping[str, int] | Mapping[str, float], keys: PatternKeys, module: str) -> float | None:
    """The value of the first key that matches `module`, or None."""
    key = keys.first_match(module)
    return None if key is None else values[key]
