"""Which modules the names and regular expressions of an adapter_config.json mean. Never slow, whatever they are.

Source: peft 0.21.2, utils/other.py `get_pattern_key`; tuners/tuners_utils.py `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraformat.diagnostics import show
from loraformat.errors import ConfigError
from loraformat.formats.peft.regex import Automaton, NotEvaluated, compile_pattern

_LITERAL = re.compile(r"[\w.\-/ ]*")

MAX_STEPS = 100_000_000

Shape = tuple[int, tuple[int, ...]]


def compiled(pattern: str, where: str) -> Automaton:
    """The automaton of a pattern.

    Raises: ConfigError (LF103): the pattern is not evaluated, because it could not be in bounded time.
    """
    try:
        return compile_pattern(pattern)
    except NotEvaluated as error:
        message = f"the regular expression {show(pattern, 80)} is not evaluated: {error}"
        raise ConfigError(message, where=where, hint="name the modules in a list") from error


@dataclass(slots=True)
class PatternKeys:
    """The keys of `rank_pattern` or `alpha_pattern`, looked up as PEFT does: the first one in file order that matches.

    A key matches when it is, as a regular expression, the end of the module path, from a dot or the start on. Most keys
    are plain paths, in which a dot stands for any character; they are found by hashing, the others one by one.
    """

    where: str
    keys: Sequence[str]
    plain: dict[Shape, dict[str, int]] = field(default_factory=dict)
    shapes: dict[int, set[Shape]] = field(default_factory=dict)
    others: list[tuple[int, Automaton]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        for order, key in enumerate(self.keys):
            if _LITERAL.fullmatch(key):
                shape = (len(key), tuple(at for at, sign in enumerate(key) if sign == "."))
                self.shapes.setdefault(len(key), set()).add(shape)
                self.plain.setdefault(shape, {}).setdefault(key, order)
            else:
                wrapped = compiled(rf"(.*\.)?({key})$", f'{self.where}["{show(key, 80)}"]')
                self.others.append((order, wrapped))

    def first_match(self, module: str) -> str | None:
        """The key that decides about `module`, or None.

        Raises: ConfigError (LF103): the lookups of all modules together would take too long.
        """
        orders = self._plain_matches(module)
        for order, automaton in self.others:
            self.steps += len(module) * len(automaton.states)
            if self.steps > MAX_STEPS:
                raise ConfigError("the patterns are not evaluated: too many for so many modules", where=self.where)
            if automaton.matches(module):
                orders.append(order)
                break
        return self.keys[min(orders)] if orders else None

    def _plain_matches(self, module: str) -> list[int]:
        found = []
        for start in _starts(module):
            tail = module[start:]
            for shape in self.shapes.get(len(tail), ()):
                text = list(tail)
                for dot in shape[1]:
                    text[dot] = "."
                order = self.plain[shape].get("".join(text))
                if order is not None:
                    found.append(order)
        return found


def _starts(module: str) -> list[int]:
    """Where a path may be cut: at its start and after each of its last 100 dots."""
    return [0, *[at + 1 for at, sign in enumerate(module) if sign == "."][-100:]]


def ends_with(module: str, name: str) -> bool:
    """Whether `name` is the module or its end from a dot on, as names in `target_modules` select."""
    return module == name or module.endswith(f".{name}")


def selected(targets: tuple[str, ...] | str, modules: Sequence[str], where: str) -> set[str]:
    """The modules that `target_modules` selects.

    Args:
        targets: names, or one regular expression for the whole path.
    Raises: ConfigError (LF103): a regular expression that is not evaluated.
    """
    if isinstance(targets, str):
        automaton = compiled(targets, where)
        if len(automaton.states) * sum(map(len, modules)) > MAX_STEPS:
            raise ConfigError("the regular expression is not evaluated: too large for so many modules", where=where)
        return {module for module in modules if automaton.matches(module)}
    names = set(targets)
    return {module for module in modules if any(module[start:] in names for start in _starts(module))}


def is_inside(path: str, name: str) -> bool:
    """Whether `name` is a run of components of `path`, as names in `modules_to_save` select."""
    return f".{name}." in f".{path}."


def lookup(values: Mapping[str, int] | Mapping[str, float], keys: PatternKeys, module: str) -> float | None:
    """The value of the first key that matches `module`, or None."""
    key = keys.first_match(module)
    return None if key is None else values[key]
