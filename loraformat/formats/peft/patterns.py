"""Which modules the names and patterns of an adapter_config.json mean. Never slow, whatever they are.

Source: peft 0.21.2, utils/other.py `get_pattern_key`; tuners/tuners_utils.py `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loraformat.diagnostics import show
from loraformat.errors import ConfigError
from loraformat.formats.targets import ends_of

_PLAIN = re.compile(r"[\w.\-/ ]*")

MAX_STEPS = 20_000_000

Shape = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class PatternKeys:
    """The keys of `rank_pattern` or `alpha_pattern`, looked up as PEFT does: the first one in file order that matches.

    A key matches when it is, as a regular expression, the end of the module path, from a dot or the start on. Most keys
    are plain paths, in which a dot stands for any character; they are found by hashing, the others one by one.

    Raises (when made): ConfigError (LF103): a pattern that cannot be evaluated in bounded time.
    """

    where: str
    keys: Sequence[str]
    plain: dict[Shape, dict[str, int]] = field(default_factory=dict)
    shapes: dict[int, set[Shape]] = field(default_factory=dict)
    others: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        for order, key in enumerate(self.keys):
            if _PLAIN.fullmatch(key):
                shape = (len(key), tuple(at for at, sign in enumerate(key) if sign == "."))
                self.shapes.setdefault(len(key), set()).add(shape)
                self.plain.setdefault(shape, {}).setdefault(key, order)
                continue
            # Most configs have plain keys only, and need no matcher.
            from loraformat.model.patterns import is_linear

            pattern = rf"(.*\.)?({key})$"
            if not is_linear(pattern):
                raise self._not_evaluated(key, "it could take for ever")
            self.others.append((order, pattern))

    def _not_evaluated(self, key: str, why: str) -> ConfigError:
        where = f'{self.where}["{show(key, 80)}"]'
        return ConfigError(f"the pattern is not evaluated: {why}", where=where, hint="write full module names")

    def first_match(self, module: str) -> str | None:
        """The key that decides about `module`, or None.

        Raises: ConfigError (LF103): the lookups of all modules together would take too long.
        """
        if not self.keys:
            return None
        orders = list(self._plain_matches(module))
        if self.others:
            orders += self._pattern_matches(module)
        return self.keys[min(orders)] if orders else None

    def _pattern_matches(self, module: str) -> Iterator[int]:
        from loraformat.model.patterns import fullmatch

        for order, pattern in self.others:
            self.steps += len(module) * len(pattern)
            matches = fullmatch(pattern, module) if self.steps <= MAX_STEPS else None
            if matches is None:
                raise self._not_evaluated(self.keys[order], "it is too large for so many or so long names")
            if matches:
                yield order
                return

    def matches(self, module: str) -> list[str]:
        """All plain keys that match `module`."""
        return [self.keys[order] for order in self._plain_matches(module)]

    def _plain_matches(self, module: str) -> Iterator[int]:
        for tail in ends_of(module):
            for shape in self.shapes.get(len(tail), ()):
                text = list(tail)
                for dot in shape[1]:
                    text[dot] = "."
                order = self.plain[shape].get("".join(text))
                if order is not None:
                    yield order


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
