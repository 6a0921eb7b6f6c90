r"""Which modules the keys of `rank_pattern` and `alpha_pattern` mean: plain paths by hashing, the others one by one.

Source: peft 0.21.2, utils/other.py `get_pattern_key`: `re.match(rf"(.*\.)?({key})$", module)`, first key first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from loraformat.budget import Budget

_PLAIN = re.compile(r"[\w.\-/ \0]*")
_ESCAPED = re.compile(r"\\([.\-/ ])")
_MOST_DOTS = 100


class OutOfSteps(Exception):
    """The lookups of all modules together would take too long; `key` is where it was noticed."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Shape(NamedTuple):
    """What a plain key looks like: its length, and where its dots stand that mean any character."""

    length: int
    dots: tuple[int, ...]


class PatternKeys:
    """Keys that are regular expressions for the end of a module path, from a dot or the start on.

    Most are plain text: names in which a dot stands for any character or is escaped, with `^` in front where the whole
    path is meant. However many of these there are, a module costs a look for each of its ends.

    Attributes:
        keys: in the order of the file, of which the first that matches decides.
        unread: those outside of what can be evaluated in bounded time; they match nothing here.
    """

    def __init__(self, keys: Sequence[str], budget: Budget) -> None:
        self.keys = keys
        self.unread: list[str] = []
        self._budget = budget
        self._wholes = _Table()
        self._ends = _Table()
        self._patterns: list[int] = []
        for order, key in enumerate(keys):
            text = _plain_text(key)
            if text is not None:
                (self._wholes if key.startswith("^") else self._ends).add(text, order)
            elif _is_linear(key, budget):
                self._patterns.append(order)
            else:
                self.unread.append(key)
        # Made when a module is asked for: the matcher is imported only for keys that are not plain text.
        self._matchers: dict[int, _Matches] = {}

    def first_match(self, module: str) -> str | None:
        """The key that decides about `module`, or None.

        Raises: OutOfSteps.
        """
        if not self.keys:
            return None
        plain = min(self._plain_matches(module), default=len(self.keys))
        for order in self._patterns:
            if order > plain:
                break
            if self._matches(order, module):
                return self.keys[order]
        return self.keys[plain] if plain < len(self.keys) else None

    def all_matches(self, module: str) -> list[str]:
        """All keys that match `module`, in their order.

        Raises: OutOfSteps.
        """
        found = [*self._plain_matches(module), *(order for order in self._patterns if self._matches(order, module))]
        return [self.keys[order] for order in sorted(found)]

    def plain_matches(self, module: str) -> list[str]:
        """All keys of plain text that match `module`.

        Raises: OutOfSteps.
        """
        return [self.keys[order] for order in self._plain_matches(module)]

    def matched_by(self, modules: Collection[str]) -> set[str]:
        """The keys that match one of `modules`.

        Raises: OutOfSteps.
        """
        found = {order for module in modules for order in self._plain_matches(module)}
        found.update(order for order in self._patterns if any(self._matches(order, module) for module in modules))
        return {self.keys[order] for order in found}

    def _plain_matches(self, module: str) -> Iterator[int]:
        yield from self._looked_up(self._wholes, module)
        for end in ends_of(module) if self._ends else ():
            yield from self._looked_up(self._ends, end)

    def _looked_up(self, table: _Table, text: str) -> Iterator[int]:
        for shape in table.shapes.get(len(text), ()):
            orders = table.find(shape, text)
            if not self._budget.spend(1 + len(shape.dots) + len(orders)):
                raise OutOfSteps(self.keys[0])
            yield from orders

    def _matches(self, order: int, module: str) -> bool:
        if order not in self._matchers:
            self._matchers[order] = _Matches(self.keys[order], self._budget)
        found = self._matchers[order](module)
        if found is None:
            raise OutOfSteps(self.keys[order])
        return found


class _Table:
    """Plain texts by shape and text, with the places of the keys that have them."""

    def __init__(self) -> None:
        self.shapes: dict[int, list[_Shape]] = {}
        self._orders: dict[_Shape, dict[str, list[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self.shapes)

    def add(self, text: str, order: int) -> None:
        """A key; a NUL in its text stands for a dot and nothing else."""
        shape = _Shape(len(text), tuple(at for at, sign in enumerate(text) if sign == "."))
        if shape not in self._orders:
            self._orders[shape] = {}
            self.shapes.setdefault(len(text), []).append(shape)
        self._orders[shape].setdefault(text.replace("\0", "."), []).append(order)

    def find(self, shape: _Shape, text: str) -> Sequence[int]:
        """The keys of this shape that match the whole text."""
        if any(text[dot] != "." for dot in shape.dots):
            signs = list(text)
            for dot in shape.dots:
                signs[dot] = "."
            text = "".join(signs)
        return self._orders[shape].get(text, ())


class _Matches:
    """A key that is not plain text, as a function of modules."""

    def __init__(self, key: str, budget: Budget) -> None:
        from loraformat.model.patterns.matching import Matcher

        self._matcher = Matcher(rf"(.*\.)?({key})$", budget)

    def __call__(self, module: str) -> bool | None:
        return self._matcher.fullmatch(module)


def is_end_of(end: str, path: str) -> bool:
    """Whether a path of modules ends in whole names as `end` does: "q_proj" and "self_attn.q_proj", not "proj"."""
    return f".{path}".endswith(f".{end}")


def ends_of(module: str) -> Iterator[str]:
    """The path itself and what follows each of its last 100 dots: all that can select it."""
    yield module
    for dot in [at for at, sign in enumerate(module) if sign == "."][-_MOST_DOTS:]:
        yield module[dot + 1 :]


def _plain_text(key: str) -> str | None:
    """The text of a key that has no sign of a pattern but anchors, dots and escaped dots (as NUL); else None."""
    if "\0" in key:
        return None
    text = key.removeprefix("^")
    if text.endswith("$") and not text.endswith("\\$"):
        text = text[:-1]
    if "\\" in text:
        text = _ESCAPED.sub(lambda found: "\0" if found[1] == "." else found[1], text)
    return text if _PLAIN.fullmatch(text) else None


def _is_linear(key: str, budget: Budget) -> bool:
    """Whether a key can be evaluated: alone, for PEFT puts it between parentheses which its own might close, and so."""
    from loraformat.model.patterns.matching import Matcher

    return all(Matcher(pattern, budget).is_linear for pattern in (key, rf"(.*\.)?({key})$"))
